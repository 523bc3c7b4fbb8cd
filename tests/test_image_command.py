"""`dstack-emu image`: directories that sha256sum accepts, registers as a boot has them, what differs between two."""

import hashlib
import http.client
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from dstack_emu.attest.image import kernel_authenticode
from dstack_emu.attest.vmconfig import VmConfig
from dstack_emu.cli.main import main
from dstack_emu.simulator.image import OsImage
from dstack_emu.simulator.image_files import archive, load_image
from dstack_emu.simulator.seed import DEFAULT_SEED, Seed
from dstack_emu.transport.image_archive import Limits, unpack, verify_image_files
from tests.commands import serving
from tests.test_image import pe_kernel

Image = Callable[..., tuple[int, str, str]]


@pytest.fixture
def image(capsys: pytest.CaptureFixture[str]) -> Image:
    """Run `dstack-emu image …`; return status, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["image", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return run


def built(image: Image, folder: Path, *options: object) -> dict[str, Any]:
    status, out, _ = image("build", folder, "--json", *options)
    assert status == 0
    answer: dict[str, Any] = json.loads(out)
    return answer


def measured(image: Image, folder: Path, *options: object) -> dict[str, Any]:
    status, out, _ = image("measure", folder, "--json", *options)
    assert status == 0
    answer: dict[str, Any] = json.loads(out)
    return answer


def failed(done: tuple[int, str, str]) -> str:
    """The one line of a command that was used wrongly."""
    status, out, err = done
    (line,) = err.splitlines()
    assert (status, out) == (2, "")
    return line.removeprefix("Error: ")


# ---- build


def test_built_directory_is_the_stacks_image_and_passes_sha256sum(image: Image, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "dstack-emu-0.6.0"
    answer = built(image, folder)
    expected = OsImage.from_seed(Seed.of(DEFAULT_SEED).derive)
    assert answer == {"path": str(folder), "os_image_hash": expected.os_image_hash.hex()}
    assert (folder / "digest.txt").read_text() == f"{answer['os_image_hash']}\n"
    check = subprocess.run(["sha256sum", "-c", "sha256sum.txt"], cwd=folder, capture_output=True, check=False)
    assert check.returncode == 0
    assert load_image(folder) == expected
    assert [path.name for path in folder.parent.iterdir()] == ["dstack-emu-0.6.0"]


def test_image_of_files_carries_them(image: Image, tmp_path: Path) -> None:
    for name in ("kernel", "initrd", "firmware"):
        (tmp_path / name).write_bytes(name.encode())
    cmdline = f"console=ttyS0 dstack.rootfs_hash={'ab' * 32} quiet"
    options = [word for name in ("kernel", "initrd", "firmware") for word in (f"--{name}", tmp_path / name)]
    status, out, err = image("build", tmp_path / "image", *options, "--cmdline", cmdline)
    assert (status, len(err.splitlines())) == (0, 2)  # what is made up is said
    assert "os_image_hash" in out
    files = load_image(tmp_path / "image").files
    assert [files[name] for name in ("bzImage", "initramfs.cpio.gz", "ovmf.fd")] == [b"kernel", b"initrd", b"firmware"]
    assert json.loads(files["metadata.json"])["cmdline"] == cmdline


def test_real_kernel_is_measured_as_one(image: Image, tmp_path: Path) -> None:
    kernel = b"MZ" + pe_kernel()[2:]
    (tmp_path / "kernel").write_bytes(kernel)
    status, _, err = image("build", tmp_path / "image", "--kernel", tmp_path / "kernel")
    assert (status, err) == (0, "")
    loaded = load_image(tmp_path / "image")
    size = len(loaded.files["initramfs.cpio.gz"])
    assert loaded.measurement.kernel_authenticode == kernel_authenticode(kernel, size)


def test_what_is_there_is_not_replaced_unless_it_is_an_image_and_wanted(image: Image, tmp_path: Path) -> None:
    folder = tmp_path / "image"
    first = built(image, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert failed(image("build", folder, "--seed", "x")) == f"{folder} is there already: --force replaces it"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert built(image, folder, "--seed", "x", "--force") != first
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear")
    said = f"{tmp_path / 'mine'} is there, and no image: it is not replaced"
    assert failed(image("build", tmp_path / "mine", "--force")) == said
    (tmp_path / "file").write_text("")
    assert failed(image("build", tmp_path / "file", "--force")) == f"{tmp_path / 'file'} is there, and no directory"
    assert {path.name for path in tmp_path.iterdir()} == {"image", "mine", "file"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--kernel", "/nope"), "--kernel: cannot read /nope: No such file or directory"),
        (
            ("--cmdline", "quiet"),
            "--cmdline: dstack.rootfs_hash=<64 hex digits> expected in it: it binds the root filesystem",
        ),
    ],
)
def test_build_refused(options: tuple[str, ...], reason: str, image: Image, tmp_path: Path) -> None:
    assert failed(image("build", tmp_path / "image", *options)) == reason
    assert list(tmp_path.iterdir()) == []


# ---- measure


def test_measured_registers_are_those_of_a_boot(image: Image, tmp_path: Path) -> None:
    built(image, tmp_path / "image")
    answer = measured(image, tmp_path / "image", "--memory", "4G", "--cpus", "3")
    config = VmConfig.parse(answer["vm_config"])
    assert (config.memory_size, config.cpu_count, config.os_image_hash.hex()) == (4 << 30, 3, answer["os_image_hash"])
    registers, log = load_image(tmp_path / "image").boot(config)
    assert [answer[name] for name in ("mrtd", "rtmr0", "rtmr1", "rtmr2")] == [
        value.hex() for value in (registers.mrtd, registers.rtmr0, registers.rtmr1, registers.rtmr2)
    ]
    assert len(answer["events"]) == len(log) == 20
    for imr in range(3):
        last = [row["after"] for row in answer["events"] if row["imr"] == imr][-1]
        assert last == answer[f"rtmr{imr}"]
    status, out, _ = image("measure", tmp_path / "image", "-v", "--memory", "4G", "--cpus", "3")
    assert status == 0
    assert all(row["digest"] in out and row["after"] in out for row in answer["events"])
    assert len(out.splitlines()) == 6 + 20


def test_machine_shows_in_its_registers(image: Image, tmp_path: Path) -> None:
    built(image, tmp_path / "image")
    plain = measured(image, tmp_path / "image")
    for options, changed in (
        (("--memory", "4G"), {"rtmr0"}),
        (("--cpus", "5"), {"rtmr0"}),
        (("--gpus", "1"), {"rtmr0"}),
        (("--nics", "2"), {"rtmr0"}),
        (("--qemu", "9.1.0"), {"mrtd", "rtmr0"}),
        (("--qemu", "8.0.0"), set()),
        (("--qemu", "8.99.1"), set()),
    ):
        other = measured(image, tmp_path / "image", *options)
        assert {name for name in ("mrtd", "rtmr0", "rtmr1", "rtmr2") if other[name] != plain[name]} == changed


def test_measured_cache_is_what_a_legacy_check_looks_for(image: Image, tmp_path: Path) -> None:
    built(image, tmp_path / "image")
    answer = measured(image, tmp_path / "image", "--cache", tmp_path / "cache")
    config = VmConfig.parse(answer["vm_config"])
    assert config.tdx_attestation_variant == "legacy"
    entry = json.loads(Path(answer["cached"]).read_text())
    assert entry["measurements"] == {name: answer[name] for name in ("mrtd", "rtmr0", "rtmr1", "rtmr2")}
    assert (tmp_path / "cache" / "images" / answer["os_image_hash"] / "metadata.json").is_file()


def test_document_of_other_files_is_pointed_out(image: Image, tmp_path: Path) -> None:
    built(image, tmp_path / "a")
    (tmp_path / "initrd").write_bytes(b"another")
    built(image, tmp_path / "b", "--initrd", tmp_path / "initrd")
    mixed = tmp_path / "mixed"
    shutil.copytree(tmp_path / "a", mixed)
    shutil.copy(tmp_path / "b" / "measurement.tdx.cbor", mixed)
    lines = [line for line in (tmp_path / "a" / "sha256sum.txt").read_text().splitlines() if "measurement" not in line]
    lines += [line for line in (tmp_path / "b" / "sha256sum.txt").read_text().splitlines() if "measurement" in line]
    (mixed / "sha256sum.txt").write_text("\n".join(lines) + "\n")
    status, _, err = image("measure", mixed)
    assert (status, err) == (
        0,
        f"{mixed}: measurement.tdx.cbor: initrd_sha384 is not of initramfs.cpio.gz\n",
    )


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: (f / "sha256sum.txt").unlink(), "is no image directory: cannot read sha256sum.txt: No such file…"),
        (lambda f: (f / "bzImage").unlink(), "is no image directory: cannot read bzImage: No such file or directory"),
        (lambda f: (f / "ovmf.fd").write_bytes(b""), ": ovmf.fd: SHA-256 …"),
        (lambda f: (f / "sha256sum.txt").write_text("x"), ": image manifest entry is missing a path"),
        (lambda f: (f / "sha256sum.txt").write_bytes(b"\xff"), ": Failed to read sha256sum.txt: …"),
        (
            lambda f: (f / "sha256sum.txt").write_text(
                (f / "sha256sum.txt").read_text().replace("metadata.json", "digest.txt")
            ),
            ": digest.txt: SHA-256 …",
        ),
    ],
)
def test_damaged_directory_refused(damage: Callable[[Path], object], reason: str, image: Image, tmp_path: Path) -> None:
    folder = tmp_path / "image"
    built(image, folder)
    damage(folder)
    said = failed(image("measure", folder)).removeprefix(str(folder)).removeprefix(" ")
    head, ellipsis, _ = reason.partition("…")
    assert said == reason if not ellipsis else said.startswith(head)


def test_memory_size_that_cannot_be_measured_refused_naming_those_that_can(image: Image, tmp_path: Path) -> None:
    built(image, tmp_path / "image")
    said = failed(image("measure", tmp_path / "image", "--memory", "2500M"))
    assert said.endswith(
        "requires memory_size == 2147483648 bytes (2048 MiB) or >= 2952790016 bytes (2816 MiB); got 2621440000 bytes"
    )


# ---- diff


def test_diff_names_the_part_and_its_register(image: Image, tmp_path: Path) -> None:
    built(image, tmp_path / "a")
    for part, register in (("kernel", "rtmr1"), ("initrd", "rtmr2"), ("firmware", "mrtd")):
        (tmp_path / part).write_bytes(b"another")
        built(image, tmp_path / "b", "--force", f"--{part}", tmp_path / part)
        status, out, _ = image("diff", tmp_path / "a", tmp_path / "b", "--json")
        answer = json.loads(out)
        assert (status, answer["same"]) == (1, False)
        assert [(change["part"], change["registers"]) for change in answer["changes"]] == [(part, [register])]
        status, out, _ = image("diff", tmp_path / "a", tmp_path / "b")
        assert f"{part}: shows in {register.upper()}" in out.splitlines()
    status, out, _ = image("diff", tmp_path / "a", tmp_path / "a", "--json")
    assert (status, json.loads(out)["same"]) == (0, True)


def test_diff_of_what_nobody_measures_says_so(image: Image, tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    built(image, a)
    shutil.copytree(a, b)
    metadata = (a / "metadata.json").read_bytes()
    (b / "metadata.json").write_bytes(metadata.replace(b"0.6.0", b"0.6.1"))
    listed = (a / "sha256sum.txt").read_text()
    for folder, text in ((a, metadata), (b, (b / "metadata.json").read_bytes())):
        (folder / "sha256sum.txt").write_text(
            listed.replace(hashlib.sha256(metadata).hexdigest(), hashlib.sha256(text).hexdigest())
        )
    status, out, _ = image("diff", a, b)
    assert (status, out.splitlines()[-1]) == (1, "no register differs: the files that differ are not measured")


# ---- serve


def test_served_archive_is_what_verifiers_download(image: Image, tmp_path: Path) -> None:
    name = built(image, tmp_path / "a")["os_image_hash"]
    with serving("image", "serve", str(tmp_path / "a"), "--listen", "127.0.0.1:0") as description:
        assert list(description["images"]) == [name]
        connection = http.client.HTTPConnection(urlsplit(description["url"]).netloc, timeout=20)
        bodies = []
        for path in (f"/mr_{name}.tar.gz", f"/os-images/mr_{name}.tar.gz", f"/{name}.tar.gz"):
            connection.request("GET", path)
            response = connection.getresponse()
            assert response.status == 200
            bodies.append(response.read())
        connection.request("GET", f"/mr_{'0' * 64}.tar.gz")
        assert connection.getresponse().status == 404
        connection.close()
    assert bodies == [archive(load_image(tmp_path / "a").files)] * 3
    (tmp_path / "image.tar.gz").write_bytes(bodies[0])
    (tmp_path / "unpacked").mkdir()
    listed = subprocess.run(["tar", "tzf", tmp_path / "image.tar.gz"], capture_output=True, text=True, check=True)
    assert set(listed.stdout.split()) == {path.name for path in (tmp_path / "a").iterdir()}
    unpack(tmp_path / "image.tar.gz", tmp_path / "unpacked", Limits(), lambda: False)
    verify_image_files(tmp_path / "unpacked", name, lambda: False)
