"""Images of the legacy variant: downloaded from whoever answers, unpacked without harm, judged by what is cached.

The server is one of our own making that does every wrong thing; archives are made by Python's tarfile, and by hand
where that is too honest.
"""

import asyncio
import functools
import gzip
import hashlib
import io
import tarfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from aiohttp import web

from dstack_emu.attest.errors import VerificationError
from dstack_emu.attest.image import Registers
from dstack_emu.attest.os_image import ImageInfo, cache_key, encode_cache_entry
from dstack_emu.attest.verify import VerifiedAttestation, VerifiedQuote
from dstack_emu.attest.vmconfig import VmConfig
from dstack_emu.simulator.image import OsImage
from dstack_emu.simulator.image_files import archive
from dstack_emu.simulator.intel import Intel
from dstack_emu.simulator.seed import Seed
from dstack_emu.simulator.trust_domain import AppCompose, TrustDomain
from dstack_emu.transport.image_archive import Limits
from dstack_emu.transport.image_store import ImageStore
from dstack_emu.transport.listen import bind_tcp, serve
from tests.ports import refusing_port

LIMITS = Limits(archive=200_000, unpacked=100_000, entries=20)
IMAGE = OsImage.from_seed(Seed.of("image store").derive)
HASH = IMAGE.os_image_hash.hex()


@dataclass
class Host:
    """Who serves images: one answer for every path, and a count of the questions."""

    url: str = ""
    answer: Callable[[web.Request], web.StreamResponse] = lambda request: web.Response(status=404)
    stall: asyncio.Event | None = None
    asked: list[str] = field(default_factory=list)
    was_asked: asyncio.Event = field(default_factory=asyncio.Event)

    def gives(self, content: bytes) -> None:
        """Answer with these bytes."""
        self.answer = lambda request: web.Response(body=content)


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    host = Host()

    async def download(request: web.Request) -> web.StreamResponse:
        host.asked.append(request.path)
        host.was_asked.set()
        if host.stall is not None:
            response = web.StreamResponse()
            await response.prepare(request)
            await response.write(archive(IMAGE.files)[:100])
            await host.stall.wait()
            return response
        return host.answer(request)

    app = web.Application()
    app.router.add_get("/{tail:.*}", download)
    server = await serve(app, bind_tcp("127.0.0.1", 0))
    host.url = server.url
    yield host
    if host.stall is not None:
        host.stall.set()
    await server.close()


@pytest.fixture
async def store(host: Host, tmp_path: Path) -> AsyncIterator[ImageStore]:
    store = ImageStore(tmp_path, f"{host.url}/mr_{{OS_IMAGE_HASH}}.tar.gz", 20, LIMITS)
    yield store
    await store.close()


@functools.cache
def evidence(claim: VmConfig) -> VerifiedAttestation:
    """Evidence of a guest that booted the image on 2 GiB, and claims some config; its quote has been judged."""
    intel = Intel(Seed.of("image store"))
    domain = TrustDomain(
        intel.platform("host"), IMAGE, AppCompose.named("app"), instance_seed=b"", claimed_config=claim.to_json()
    )
    domain.boot()
    attestation = domain.attest(bytes(64))
    return VerifiedAttestation(attestation, VerifiedQuote("UpToDate", (), b"", domain.report(bytes(64))))


LEGACY = replace(IMAGE.vm_config(), tdx_attestation_variant="legacy")


def fill(folder: Path, registers: Registers, config: VmConfig = LEGACY) -> None:
    """Put measurements into a cache, as somebody with a QEMU would."""
    (folder / "measurements").mkdir()
    (folder / "measurements" / f"{cache_key(config)}.json").write_bytes(encode_cache_entry(registers))


async def refusal(store: ImageStore, claim: VmConfig = LEGACY) -> str:
    with pytest.raises(VerificationError) as refused:
        await store.verify(evidence(claim))
    return str(refused.value)


def left_over(folder: Path) -> list[str]:
    """Everything in the cache but the two folders that hold others."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name not in ("images", "tmp"))


# ---- what is well


async def test_image_is_downloaded_checked_and_kept(host: Host, store: ImageStore, tmp_path: Path) -> None:
    host.gives(archive({**IMAGE.files, "unlisted": b"x"}))
    registers, _ = IMAGE.boot(LEGACY)
    fill(tmp_path, registers)
    noted: list[ImageInfo] = []
    verdict = await store.verify(evidence(LEGACY), on_image=noted.append)
    assert verdict.acpi_tables_verified
    assert verdict.vm_config == LEGACY
    assert noted == [ImageInfo("0.6.0", False)]
    assert host.asked == [f"/mr_{HASH}.tar.gz"]
    folder = tmp_path / "images" / HASH
    kept = {"ovmf.fd", "bzImage", "initramfs.cpio.gz", "metadata.json", "measurement.tdx.cbor", "sha256sum.txt"}
    assert {path.name for path in folder.iterdir()} == kept
    assert all((folder / name).read_bytes() == IMAGE.files[name] for name in kept)
    assert list((tmp_path / "images" / "tmp").iterdir()) == []
    await store.verify(evidence(LEGACY))
    assert len(host.asked) == 1


async def test_image_is_downloaded_once_for_all_who_wait(host: Host, store: ImageStore, tmp_path: Path) -> None:
    host.gives(archive(IMAGE.files))
    fill(tmp_path, IMAGE.boot(LEGACY)[0])
    await asyncio.gather(*(store.verify(evidence(LEGACY)) for _ in range(5)))
    assert len(host.asked) == 1


async def test_lite_variant_asks_nobody_and_writes_nothing(host: Host, store: ImageStore, tmp_path: Path) -> None:
    verdict = await store.verify(evidence(IMAGE.vm_config()))
    assert not verdict.acpi_tables_verified
    assert (host.asked, left_over(tmp_path)) == ([], [])


def _packed(pack: Callable[[tarfile.TarFile], None], **options: object) -> bytes:
    """An archive by Python's tarfile."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", **options) as tar:  # type: ignore[call-overload]
        pack(tar)
    return out.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes = b"", **fields: object) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    for key, value in fields.items():
        setattr(entry, key, value)
    tar.addfile(entry, io.BytesIO(content))


def _image_under(prefix: str, tar: tarfile.TarFile) -> None:
    _add(tar, prefix or ".", type=tarfile.DIRTYPE)
    for name, content in IMAGE.files.items():
        _add(tar, prefix + name, content)


@pytest.mark.parametrize("options", [{"format": tarfile.GNU_FORMAT}, {"format": tarfile.PAX_FORMAT}])
async def test_archive_of_another_packer_is_taken(
    options: dict[str, object], host: Host, store: ImageStore, tmp_path: Path
) -> None:
    def pack(tar: tarfile.TarFile) -> None:
        _image_under("./", tar)
        _add(tar, "./" + "long" * 60, b"dropped", pax_headers={"comment": "ü"})

    host.gives(_packed(pack, **options))
    fill(tmp_path, IMAGE.boot(LEGACY)[0])
    assert (await store.verify(evidence(LEGACY))).acpi_tables_verified


async def test_archive_of_several_gzip_members_is_read_to_its_end(
    host: Host, store: ImageStore, tmp_path: Path
) -> None:
    plain = gzip.decompress(archive(IMAGE.files))
    host.gives(gzip.compress(plain[:5000]) + gzip.compress(plain[5000:]))
    fill(tmp_path, IMAGE.boot(LEGACY)[0])
    assert (await store.verify(evidence(LEGACY))).acpi_tables_verified


async def test_redirect_is_followed_for_the_hash_decides(host: Host, store: ImageStore, tmp_path: Path) -> None:
    def answer(request: web.Request) -> web.StreamResponse:
        if request.path == "/elsewhere":
            return web.Response(body=archive(IMAGE.files))
        raise web.HTTPFound("/elsewhere")

    host.answer = answer
    fill(tmp_path, IMAGE.boot(LEGACY)[0])
    assert (await store.verify(evidence(LEGACY))).acpi_tables_verified
    assert host.asked == [f"/mr_{HASH}.tar.gz", "/elsewhere"]


# ---- registers


async def test_other_registers_are_refused_and_the_image_stays(host: Host, store: ImageStore, tmp_path: Path) -> None:
    host.gives(archive(IMAGE.files))
    registers, _ = IMAGE.boot(LEGACY)
    fill(tmp_path, replace(registers, rtmr1=bytes(48)))
    noted: list[ImageInfo] = []
    with pytest.raises(VerificationError) as refused:
        await store.verify(evidence(LEGACY), on_image=noted.append)
    quoted = registers.rtmr1.hex()
    assert str(refused.value) == f"MRs do not match: RTMR1 mismatch: expected={'00' * 48}, actual={quoted}"
    assert noted == [ImageInfo("0.6.0", False)]
    assert (tmp_path / "images" / HASH / "metadata.json").exists()


async def test_without_measurements_it_says_where_they_belong(host: Host, store: ImageStore, tmp_path: Path) -> None:
    host.gives(archive(IMAGE.files))
    said = await refusal(store)
    assert said.startswith("Failed to compute expected measurements: Failed to compute expected MRs: ")
    assert said.endswith(f"put them into {tmp_path / 'measurements' / cache_key(LEGACY)}.json")


async def test_measurements_of_another_machine_do_not_count(host: Host, store: ImageStore, tmp_path: Path) -> None:
    host.gives(archive(IMAGE.files))
    fill(tmp_path, IMAGE.boot(LEGACY)[0], replace(LEGACY, cpu_count=3))
    assert (await refusal(store)).startswith("Failed to compute expected measurements: ")


async def test_cached_image_whose_checksum_file_was_changed_is_refused(
    host: Host, store: ImageStore, tmp_path: Path
) -> None:
    host.gives(archive(IMAGE.files))
    fill(tmp_path, IMAGE.boot(LEGACY)[0])
    await store.verify(evidence(LEGACY))
    (tmp_path / "images" / HASH / "sha256sum.txt").write_text("")
    said = "legacy TDX attestation requires os_image_hash = sha256(sha256sum.txt)"
    assert await refusal(store) == said
    (tmp_path / "images" / HASH / "sha256sum.txt").unlink()
    assert await refusal(store) == said
    (tmp_path / "images" / HASH / "metadata.json").write_text("{")
    assert (await refusal(store)).startswith("Failed to parse image metadata: ")


@pytest.mark.parametrize("claimed", [b"", b"\xab", b"\xab" * 33])
async def test_hash_of_another_size_names_no_image(
    claimed: bytes, host: Host, store: ImageStore, tmp_path: Path
) -> None:
    said = await refusal(store, replace(LEGACY, os_image_hash=claimed))
    assert said == (f"Failed to download image {claimed.hex()}: os_image_hash does not match sha256(sha256sum.txt)")
    assert (host.asked, left_over(tmp_path)) == ([], [])


# ---- servers and archives that mean harm


def _files(*names_and_content: tuple[str, bytes]) -> Callable[[tarfile.TarFile], None]:
    def pack(tar: tarfile.TarFile) -> None:
        for name, content in names_and_content:
            _add(tar, name, content)

    return pack


def _special(name: str, kind: bytes, target: str = "") -> Callable[[tarfile.TarFile], None]:
    return lambda tar: _add(tar, name, type=kind, linkname=target)


def _through_symlink(tar: tarfile.TarFile) -> None:
    _add(tar, "d", type=tarfile.SYMTYPE, linkname="/tmp")
    _add(tar, "d/evil", b"x")


def _changed(**files: bytes | None) -> bytes:
    """The image with files replaced or left out; `sha256sum` stands for sha256sum.txt."""
    named = {name.replace("__", "."): content for name, content in files.items()}
    kept = {name: content for name, content in {**IMAGE.files, **named}.items() if content is not None}
    return archive(kept)


def _sparse() -> bytes:
    entry = tarfile.TarInfo("sparse")
    entry.type = tarfile.GNUTYPE_SPARSE
    return gzip.compress(entry.tobuf(tarfile.GNU_FORMAT) + bytes(1024))


def _pax(records: bytes, size: int | None = None) -> bytes:
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, len(records) if size is None else size
    return gzip.compress(header.tobuf(tarfile.USTAR_FORMAT) + records.ljust(-(-len(records) // 512) * 512, b"\0"))


def _claims(size: int) -> bytes:
    entry = tarfile.TarInfo("huge")
    entry.size = size
    return gzip.compress(entry.tobuf(tarfile.GNU_FORMAT))


HARM: dict[str, tuple[bytes, str]] = {
    "climbs": (_packed(_files(("../evil", b"x"))), "image archive contains unsafe path ../evil"),
    "climbs later": (_packed(_files(("a/../../evil", b"x"))), "image archive contains unsafe path a/../../evil"),
    "absolute": (_packed(_files(("/tmp/evil", b"x"))), "image archive contains unsafe path /tmp/evil"),
    "deep": (_packed(_files(("a/" * 40 + "b", b"x"))), "image archive contains unsafe path a/a/a/…"),
    "symlink": (
        _packed(_special("link", tarfile.SYMTYPE, "/etc/passwd")),
        "image archive contains unsupported entry link",
    ),
    "through a symlink": (_packed(_through_symlink), "image archive contains unsupported entry d"),
    "hard link": (
        _packed(_special("link", tarfile.LNKTYPE, "../../../x")),
        "image archive contains unsupported entry link",
    ),
    "device": (_packed(_special("null", tarfile.CHRTYPE)), "image archive contains unsupported entry null"),
    "fifo": (_packed(_special("pipe", tarfile.FIFOTYPE)), "image archive contains unsupported entry pipe"),
    "sparse": (_sparse(), "image archive contains unsupported entry sparse"),
    "pax sparse": (
        _pax(b"22 GNU.sparse.major=1\n"),
        "image archive contains unsupported entry: a sparse file",
    ),
    "pax nonsense": (_pax(b"99 path=x\n"), "Failed to read image archive entry: malformed pax record"),
    "pax path": (
        _pax(b"19 path=../../evil\n") + gzip.compress(tarfile.TarInfo("good").tobuf()),
        "image archive contains unsafe path ../../evil",
    ),
    "pax size": (
        _pax(b"19 size=9999999999\n") + gzip.compress(tarfile.TarInfo("good").tobuf()),
        "image archive unpacks to more than 100000 bytes",
    ),
    "huge header": (_pax(b"", 1 << 30), "image archive has a header of 1073741824 bytes, at most 65536 expected"),
    "duplicate": (
        _packed(_files(("a", b"1"), ("./a", b"2"))),
        "image archive contains duplicate entry ./a",
    ),
    "file as folder": (
        _packed(_files(("a", b"1"), ("a/b", b"2"))),
        "Failed to extract image archive entry: …",
    ),
    "bomb": (
        _packed(_files(("zeros", bytes(100_001)))),
        "image archive unpacks to more than 100000 bytes",
    ),
    "bomb of many": (
        _packed(_files(*((f"zeros{n}", bytes(20_000)) for n in range(6)))),
        "image archive unpacks to more than 100000 bytes",
    ),
    "entries": (
        _packed(_files(*((f"file{n}", b"") for n in range(21)))),
        "image archive has more than 20 entries",
    ),
    "claims more than there is": (_claims(90_000), "Failed to read image archive entry: unexpected end of the archive"),
    "claims the moon": (_claims(1 << 50), "image archive unpacks to more than 100000 bytes"),
    "no gzip": (b"hello", "Failed to read image archive: Not a gzipped file (b'he')"),
    "no tar": (gzip.compress(b"x" * 1024), "Failed to read image archive: …"),
    "nothing": (b"", "Failed to read image archive entry: unexpected end of the archive"),
    "broken off": (archive(IMAGE.files)[:-3000], "Failed to read image archive: …"),
    "too long": (bytes(200_001), "Failed to download image: it is longer than 200000 bytes, url: …"),
    "no manifest": (_changed(sha256sum__txt=None), "Failed to read sha256sum.txt: No such file or directory"),
    "manifest of another image": (
        archive(OsImage.from_seed(Seed.of("another").derive).files),
        "os_image_hash does not match sha256(sha256sum.txt)",
    ),
    "manifest climbs": (
        _changed(sha256sum__txt=f"{'0' * 64}  ../../x\n".encode()),
        "image manifest line 1 has an unsafe path",
    ),
    "kernel changed": (
        _changed(bzImage=b"\0" + IMAGE.files["bzImage"][1:]),
        "Checksum verification failed: sha256sum: WARNING: 1 computed checksum did NOT match\n",
    ),
    "initrd missing": (
        _changed(**{"initramfs__cpio__gz": None}),
        "Checksum verification failed: sha256sum: initramfs.cpio.gz: No such file or directory\n"
        "sha256sum: WARNING: 1 listed file could not be read\n",
    ),
}


@pytest.mark.parametrize(("content", "cause"), HARM.values(), ids=HARM.keys())
async def test_harmful_archive_is_refused_and_leaves_nothing(
    content: bytes, cause: str, host: Host, store: ImageStore, tmp_path: Path
) -> None:
    host.gives(content)
    said = await refusal(store)
    head, ellipsis, _ = f"Failed to download image {HASH}: {cause}".partition("…")
    assert said == head if not ellipsis else said.startswith(head)
    assert left_over(tmp_path) == []
    assert not (tmp_path.parent / "evil").exists()


async def test_metadata_is_required(host: Host, store: ImageStore, tmp_path: Path) -> None:
    manifest = "".join(
        f"{hashlib.sha256(IMAGE.files[name]).hexdigest()}  {name}\n" for name in ("bzImage", "ovmf.fd")
    ).encode()
    host.gives(_changed(sha256sum__txt=manifest))
    claimed = hashlib.sha256(manifest).digest()
    said = await refusal(store, replace(LEGACY, os_image_hash=claimed))
    cause = "metadata.json not found in the extracted archive"
    assert said == f"Failed to download image {claimed.hex()}: {cause}"
    assert left_over(tmp_path) == []


@pytest.mark.parametrize(("status", "shown"), [(404, "404 Not Found"), (500, "500 Internal Server Error")])
async def test_other_status_is_refused(status: int, shown: str, host: Host, store: ImageStore, tmp_path: Path) -> None:
    host.answer = lambda request: web.Response(status=status, body=archive(IMAGE.files))
    url = f"{host.url}/mr_{HASH}.tar.gz"
    said = f"Failed to download image {HASH}: Failed to download image: HTTP status {shown}, url: {url}"
    assert await refusal(store) == said
    assert left_over(tmp_path) == []


async def test_nobody_there_is_an_error_of_the_request(tmp_path: Path) -> None:
    with refusing_port() as port:
        url = f"http://127.0.0.1:{port}"
        store = ImageStore(tmp_path, f"{url}/mr_{{OS_IMAGE_HASH}}.tar.gz", 20)
        said = await refusal(store)
        await store.close()
    assert said == (
        f"Failed to download image {HASH}: Failed to download image: error sending request for url "
        f"({url}/mr_{HASH}.tar.gz): Connection refused"
    )
    assert left_over(tmp_path) == []


async def test_stalling_server_ends_with_the_timeout_and_leaves_nothing(host: Host, tmp_path: Path) -> None:
    host.stall = asyncio.Event()
    store = ImageStore(tmp_path, f"{host.url}/mr_{{OS_IMAGE_HASH}}.tar.gz", 0.2, LIMITS)
    assert await refusal(store) == "Download image timeout: deadline has elapsed"
    await store.close()
    assert left_over(tmp_path) == []


async def test_cancelled_download_leaves_nothing_and_another_may_follow(
    host: Host, store: ImageStore, tmp_path: Path
) -> None:
    host.stall = asyncio.Event()
    fill(tmp_path, IMAGE.boot(LEGACY)[0])
    task = asyncio.create_task(store.verify(evidence(LEGACY)))
    await host.was_asked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [name for name in left_over(tmp_path) if not name.startswith("measurements")] == []
    host.stall.set()
    host.stall = None
    host.gives(archive(IMAGE.files))
    await store.verify(evidence(LEGACY))
