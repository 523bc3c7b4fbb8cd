"""Build what a release consists of, twice, and check that both builds are equal; or audit what it installs.

`make release` runs it: sdist and wheel from the files of HEAD, the wheel tried in a bare environment of each Python
that is here, the image, and a bill of materials (CycloneDX) for wheel and image. All is in `dist/`, with SHA256SUMS.
`make audit` looks up known vulnerabilities and security updates of Debian, and checks the licences.

Every file has the date of the commit. The tools are those of requirements/release.txt, in an environment of their own.
"""

import argparse
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
DIST: Final = ROOT / "dist"
TOOLS: Final = ROOT / ".release/bin"
IMAGE: Final = "dstack-emu"
PYTHONS: Final = ("python3.11", "python3.12", "python3.13", "python3.14")
LICENCES: Final = (
    "Apache",
    "BSD",
    "MIT",
    "MPL",
    "Mozilla Public",
    "ISC",
    "Python",
    "PSF",
    "Public Domain",
    "Unlicense",
)
"""A licence whose name has one of these may be installed beside a program under Apache-2.0."""
PIP: Final = ("-m", "pip", "--disable-pip-version-check", "--quiet", "--no-input")


class ReleaseError(Exception):
    """What is built is not fit for a release; the text says why."""


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("build", "audit"), default="build")
    parser.add_argument("--no-image", action="store_true", help="leave the image out")
    arguments = parser.parse_args()
    try:
        if arguments.what == "audit":
            audit()
        else:
            build(with_image=not arguments.no_image)
    except ReleaseError as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    return 0


def build(with_image: bool) -> None:
    """Build everything twice into `dist/`, try it, and print the digests."""
    if changed := run("git", "status", "--porcelain").strip():
        print(f"Not in the release, because it is not committed:\n{changed}")
    shutil.rmtree(DIST, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="dstack-emu-release-") as name:
        work = Path(name)
        first, second = packages(work / "first"), packages(work / "second")
        same("sdist and wheel", digests(first), digests(second))
        shutil.copytree(first, DIST)
        (wheel,) = DIST.glob("*.whl")
        tried = [python for python in PYTHONS if tries(python, wheel, work)]
        if not tried:
            raise ReleaseError(f"none of {', '.join(PYTHONS)} runs here, so the wheel was not tried")
    if with_image and shutil.which("docker") is None:
        print("SKIPPED: the image: there is no docker here")
    elif with_image:
        image()
    sums = digests(DIST)
    (DIST / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    print("".join(f"{digest}  dist/{name}\n" for name, digest in sums.items()), end="")


def packages(folder: Path) -> Path:
    """Return a folder with sdist and wheel, built from the files of HEAD."""
    sources, built = folder / "sources", folder / "dist"
    sources.mkdir(parents=True)
    archive = folder / "sources.tar"
    run("git", "archive", "--output", str(archive), "HEAD")
    with tarfile.open(archive) as files:
        files.extractall(sources, filter="data")
    # The wheel is built from the sdist, so what an sdist lacks is missed here.
    run(str(TOOLS / "python"), "-m", "build", "--no-isolation", "--outdir", str(built), str(sources))
    (sdist,) = built.glob("*.tar.gz")
    normalize(sdist)
    return built


def normalize(sdist: Path) -> None:
    """Write an archive anew, without the dates and the user of this build: setuptools keeps them."""
    packed = sdist.with_suffix(".new")
    with (
        tarfile.open(sdist) as old,
        packed.open("wb") as file,
        gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=int(date())) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member in sorted(old.getmembers(), key=lambda each: each.name):
            member.mtime, member.uid, member.gid, member.uname, member.gname = int(date()), 0, 0, "", ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            member.pax_headers = {}
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
    packed.replace(sdist)


def tries(name: str, wheel: Path, work: Path) -> bool:
    """Install the wheel in a bare environment of a Python, run it, and describe it; return whether it could."""
    python = next((path for path in candidates(name) if works(path, name)), None)
    if python is None:
        print(f"SKIPPED: {name} is not here")
        return False
    folder = work / name
    run(python, "-m", "venv", str(folder))
    inside = str(folder / "bin/python")
    hashed = ("--require-hashes", "--only-binary=:all:", "--requirement", str(ROOT / "requirements/run.txt"))
    installed = attempt(inside, *PIP, "install", *hashed)
    if installed.returncode:
        last = installed.stderr.strip().splitlines()[-1]
        print(f"SKIPPED: {name} has no wheel of every dependency: {last}")
        return False
    run(inside, *PIP, "install", "--no-index", "--no-deps", str(wheel))
    command = str(folder / "bin/dstack-emu")
    print(f"{name}: {run(command, '--version', cwd=work).strip()}")
    print(f"{name}: {run(command, 'runbook', cwd=work).strip().splitlines()[-1]}")
    bill = DIST / f"{wheel.stem}.cdx.json"
    if not bill.exists():
        run(str(TOOLS / "cyclonedx-py"), "environment", inside, "--output-reproducible", "--output-file", str(bill))
    return True


def candidates(name: str) -> list[str]:
    """Return the paths that may be this Python: on the path, and where pyenv keeps it."""
    version = name.removeprefix("python")
    versions = sorted(Path(os.environ.get("PYENV_ROOT", "/nonexistent"), "versions").glob(f"{version}.*/bin/{name}"))
    return [*filter(None, [shutil.which(name)]), *map(str, versions)]


def works(python: str, name: str) -> bool:
    """Tell whether it runs: some systems have names that are found and then fail."""
    return attempt(python, "-c", f"import sys, venv; assert sys.version.startswith({name[6:]!r})").returncode == 0


def image() -> None:
    """Build the image twice without a cache, compare its layers, and describe it."""
    built = []
    for _ in range(2):
        # BASE_IMAGE, BUILD_NETWORK and PIP_CA_FILE are those of docker-compose.yaml.
        setting = os.environ.get
        options = ["--build-arg", f"SOURCE_DATE_EPOCH={date()}"]
        options += ["--build-arg", f"BASE_IMAGE={base}"] if (base := setting("BASE_IMAGE")) else []
        options += ["--network", network] if (network := setting("BUILD_NETWORK")) else []
        options += ["--secret", f"id=pip_ca,src={setting('PIP_CA_FILE', os.devnull)}"]
        with tempfile.TemporaryDirectory() as sources:
            packed = Path(sources, "sources.tar")
            run("git", "archive", "--output", str(packed), "HEAD")
            with tarfile.open(packed) as files:
                files.extractall(Path(sources, "files"), filter="data")
            run("docker", "build", "--no-cache", "--quiet", *options, "--tag", IMAGE, str(Path(sources, "files")))
        layers = json.loads(run("docker", "image", "inspect", "--format", "{{json .RootFS.Layers}}", IMAGE))
        built.append({f"layer {place}": digest for place, digest in enumerate(layers)})
    same("image", *built)
    (DIST / f"{IMAGE}-image.layers").write_text("".join(f"{digest}\n" for digest in built[0].values()))
    (DIST / f"{IMAGE}-image.cdx.json").write_text(bill_of_image())
    scan_image()


def scan_image() -> None:
    """Say which security updates of Debian the image lacks. They come with a newer base image, so they are no error."""
    network = os.environ.get("BUILD_NETWORK", "bridge")
    script = """. /etc/os-release
echo "deb http://deb.debian.org/debian-security $VERSION_CODENAME-security main" >/etc/apt/sources.list.d/scan.list
apt-get --error-on=any update >/dev/null && apt-get --simulate upgrade"""
    inside = ("--rm", "--user", "0", "--network", network, "--entrypoint", "sh", IMAGE)
    asked = attempt("docker", "run", *inside, "-e", "-c", script)
    if asked.returncode:
        print("SKIPPED: the security updates that the image lacks: Debian's archive does not answer here")
        return
    lines = [line for line in asked.stdout.splitlines() if line.startswith("Inst ") and "Debian-Security:" in line]
    for _, name, old, new, *_ in map(str.split, lines):
        print(f"a security update of Debian: {name} {old.strip('[]')}, now {new.strip('(')}")
    if lines:
        print(f"The image lacks {len(lines)} security updates: pull or name a newer base image (BASE_IMAGE)")
    else:
        print("the image lacks no security update of Debian")


def bill_of_image() -> str:
    """Return the bill of materials of the image: the packages of Debian and of Python in it."""
    inside = ("docker", "run", "--rm", "--network", "none", "--entrypoint")
    debian = run(*inside, "dpkg-query", IMAGE, "--show", "--showformat", "deb ${Package} ${Version}\\n")
    python = run(*inside, "python", IMAGE, "-m", "pip", "list", "--format", "freeze", "--disable-pip-version-check")
    lines = [*debian.splitlines(), *(f"pypi {line.replace('==', ' ')}" for line in python.splitlines())]
    return run(str(TOOLS / "python"), str(Path(__file__).with_name("bill_of_materials.py")), given="\n".join(lines))


def audit() -> None:
    """Look up the vulnerabilities of all dependencies, and check the licences of what is installed."""
    for name in ("image", "dev"):
        requirements = ("--disable-pip", "--require-hashes", "--requirement", str(ROOT / f"requirements/{name}.txt"))
        asked = attempt(str(TOOLS / "pip-audit"), "--format", "json", *requirements)
        packages = json.loads(asked.stdout)["dependencies"] if asked.stdout.startswith("{") else []
        known = [package for package in packages if "vulns" in package]
        if vulnerable := [package for package in known if package["vulns"]]:
            raise ReleaseError(f"known vulnerabilities:\n{json.dumps(vulnerable, indent=2)}")
        if known:
            print(f"requirements/{name}.txt: no vulnerability in the {len(known)} packages that the database has")
        else:
            print(f"SKIPPED: the vulnerabilities of requirements/{name}.txt: no database answers here")
    if shutil.which("docker") and not attempt("docker", "image", "inspect", IMAGE).returncode:
        scan_image()
    else:
        print("SKIPPED: the security updates of Debian: there is no image here (make release builds it)")
    names = ("--python", str(ROOT / ".venv/bin/python"), "--from", "all", "--format", "json")
    found = json.loads(run(str(TOOLS / "pip-licenses"), *names))
    strange = [
        f"{each['Name']}: {words}" for each in found if not any(map((words := licence_of(each)).__contains__, LICENCES))
    ]
    if strange:
        raise ReleaseError("licences that nobody has judged (see LICENCES in tools/release.py):\n" + "\n".join(strange))
    print(f"licences: {len(found)} packages, each under one of {', '.join(LICENCES)}")


def licence_of(package: dict[str, str]) -> str:
    """Return every text that says a package's licence."""
    return " / ".join(text for key, text in package.items() if key.startswith("License"))


def same(what: str, first: dict[str, str], second: dict[str, str]) -> None:
    """Check that two builds are equal, each a map of names to digests."""
    differ = [name for name in sorted(first.keys() | second.keys()) if first.get(name) != second.get(name)]
    if differ:
        raise ReleaseError(f"two builds of the {what} differ in {', '.join(differ)}")
    print(f"two builds of the {what} are equal")


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file, in hexadecimal, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def date() -> str:
    """Return the date of HEAD, in seconds since 1970."""
    return run("git", "log", "-1", "--format=%ct").strip()


def run(*command: str, cwd: Path = ROOT, given: str | None = None) -> str:
    """Run a command, and return what it prints."""
    done = attempt(*command, cwd=cwd, given=given)
    if done.returncode:
        words = (done.stdout + done.stderr).strip()[-4000:]
        raise ReleaseError(f"`{' '.join(command)}` ended with status {done.returncode}:\n{words}")
    return done.stdout


def attempt(*command: str, cwd: Path = ROOT, given: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command without the settings that would make a build depend on this shell."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    kept |= {"PYTHONHASHSEED": "0", "PATH": path_with(TOOLS)}
    if command[0] != "git":
        kept["SOURCE_DATE_EPOCH"] = date()
    return subprocess.run(command, cwd=cwd, env=kept, input=given, capture_output=True, text=True, check=False)


def path_with(folder: Path) -> str:
    """Return the search path with a folder before all others."""
    return f"{folder}:{os.environ['PATH']}"


if __name__ == "__main__":
    sys.exit(main())
