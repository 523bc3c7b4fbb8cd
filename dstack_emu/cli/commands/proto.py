"""`dstack-emu proto`: write the .proto files, for clients in any language."""

import argparse
from importlib import resources
from pathlib import Path

from dstack_emu.cli.commands.common import UsageError

DESCRIPTION = (
    "Write the .proto files of the guest agent (packages dstack_guest and dstack.guest.v1), the KMS (packages kms "
    "and kms_v05), the VMM (packages vmm, vmm_v05 and guest_api) and the gateway (packages gateway and gateway_v05) "
    "into a folder, to generate clients from. It is an error if a file of such a name exists with other contents."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder; created if it is missing")


def run(arguments: argparse.Namespace) -> int:
    """Write the files and print their paths."""
    folder: Path = arguments.folder
    files = resources.files("dstack_emu.attest.proto").iterdir()
    sources = {file.name: file.read_text() for file in files if file.name.endswith(".proto")}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in sources.items():
            path = folder / name
            if path.exists() and path.read_text() != text:
                raise UsageError(f"{path} exists already with other contents: name another folder")
        for name, text in sorted(sources.items()):
            (folder / name).write_text(text)
            print(folder / name)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{folder} cannot be written: {error}") from error
    return 0
