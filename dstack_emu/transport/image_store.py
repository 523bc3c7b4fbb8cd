"""Judging evidence by its OS image: the one check behind a KMS's keys and behind a verifier's answer.

The lite variant needs nothing but the evidence. The legacy variant needs the image, which is downloaded by a URL
template and kept, and the registers of that machine, which only QEMU's ACPI tables give: they have to lie in the cache
of measurements already, for there is no QEMU here.

The cache has upstream's layout, so that either can use the other's: `images/<os_image_hash>/` with an image's files,
`images/tmp/` for what is being downloaded, and `measurements/<key>.json`. It only grows: who runs it clears it.

Source of truth: `CvmVerifier` of dstack `dstack/verifier/src/verification.rs` at 312dc605.
"""

import asyncio
import logging
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from dstack_emu.attest.cache import Memo
from dstack_emu.attest.errors import FormatError, UnverifiableError, VerificationError
from dstack_emu.attest.image import AcpiDigests, ImageMeasurement, Registers, os_image_hash
from dstack_emu.attest.os_image import (
    CHECKSUM_FILE,
    METADATA_FILE,
    ImageInfo,
    acpi_digests,
    cache_key,
    decode_cache_entry,
    decode_vm_config,
    lite_measurement,
    lite_registers,
    require_registers,
)
from dstack_emu.attest.verify import VerifiedAttestation
from dstack_emu.attest.vmconfig import VmConfig
from dstack_emu.transport.failures import AnswerTooLongError, NoAnswerError
from dstack_emu.transport.http_client import HttpClient
from dstack_emu.transport.image_archive import Limits, Stopped, StoppedError, admit, unpack
from dstack_emu.transport.status import status_line

PLACEHOLDER: Final = "{OS_IMAGE_HASH}"
"""What a download URL must contain: the image's hash, in hex, takes its place."""

_HASH_SIZE: Final = 32
_AT_ONCE: Final = 4  # downloads under way: whoever calls names an image, and must not fill the disk with many
_MAX_CACHED: Final = 1024 * 1024

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ImageVerdict:
    """The registers are those of the image that this config names; in the legacy variant with ACPI tables and all."""

    vm_config: VmConfig
    acpi_tables_verified: bool


def _read_config(text: str) -> tuple[VmConfig, ImageMeasurement | None]:
    """Read a VM config, and of the lite variant the measurement document in it, which is None of the legacy one."""
    config = decode_vm_config(text)
    return config, lite_measurement(config) if config.tdx_attestation_variant == "lite" else None


class ImageStore:
    """Verifies boots by their images, with a cache in one folder. Close it, for its connections.

    `download_url` contains PLACEHOLDER; `timeout` is what a download may take in all, in seconds.
    """

    def __init__(self, cache_dir: Path, download_url: str, timeout: float, limits: Limits | None = None) -> None:
        self._images, self._measurements = cache_dir / "images", cache_dir / "measurements"
        self._download_url, self._timeout = download_url, timeout
        self._limits = limits or Limits()
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._coming: dict[str, asyncio.Lock] = {}
        # The deadline is the caller's; what is served as gzip is an archive, and is not to be unpacked here.
        self._client = HttpClient(timeout=timeout, max_answer=self._limits.archive, unpacks=False)
        # Of machines that boot one image alike there are many, and each calls often.
        self._read_config = Memo(_read_config, lambda text, _: 3 * len(text), max_entries=256, max_bytes=4 << 20)
        self._lite_registers = Memo(
            self._compute, lambda boot, _: len(boot[0]) + 512, max_entries=256, max_bytes=4 << 20
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def verify(
        self,
        evidence: VerifiedAttestation,
        vm_config: str = "",
        *,
        on_image: Callable[[ImageInfo], None] = lambda info: None,
    ) -> ImageVerdict:
        """Recompute MRTD and RTMR0 to 2; `vm_config`, a request's, goes before the evidence's own.

        `on_image` is called with what the image says of itself, once it is there, whatever the result. Raises
        `VerificationError` with upstream's words.
        """
        text = vm_config or evidence.attestation.config
        config, measurement = self._read_config(text)
        if measurement is not None:
            expected = self._lite_registers((text, acpi_digests(evidence.attestation.event_log)))
            require_registers(expected, evidence.quote.report)
            return ImageVerdict(config, acpi_tables_verified=False)
        info, checksum_hash = await self._image(config.os_image_hash)
        if checksum_hash != config.os_image_hash:
            raise VerificationError(f"legacy TDX attestation requires os_image_hash = sha256({CHECKSUM_FILE})")
        on_image(info)
        require_registers(self._computed_before(config), evidence.quote.report)
        return ImageVerdict(config, acpi_tables_verified=True)

    def _compute(self, boot: tuple[str, AcpiDigests]) -> Registers:
        """Compute the registers of a lite boot: the text of its VM config, and the digests of its ACPI tables."""
        config, measurement = self._read_config(boot[0])
        assert measurement is not None  # noqa: S101 - it is of the lite variant
        return lite_registers(measurement, config, boot[1])

    def _computed_before(self, vm_config: VmConfig) -> Registers:
        path = self._measurements / f"{cache_key(vm_config)}.json"
        try:
            registers = decode_cache_entry(_read(path))
        except OSError:
            registers = None
        if registers is None:
            raise VerificationError(
                "Failed to compute expected measurements: Failed to compute expected MRs: this emulator has no QEMU, "
                f"whose ACPI tables they depend on; put them into {path}"
            )
        return registers

    async def _image(self, wanted: bytes) -> tuple[ImageInfo, bytes]:
        """Have an image at hand; return what it says of itself, and the hash of its checksum file as it lies there."""
        name = wanted.hex()
        folder = self._images / name
        # A hash of another size has no folder of its own (the empty one would be all images'), and no image.
        if len(wanted) != _HASH_SIZE:
            raise VerificationError(
                f"Failed to download image {name:.80}: os_image_hash does not match sha256({CHECKSUM_FILE})"
            )
        if not (folder / METADATA_FILE).exists():
            await self._download_in_time(name, folder)
        try:
            info = ImageInfo.parse(_read(folder / METADATA_FILE))
        except OSError as error:
            raise VerificationError(f"Failed to read image metadata: {error.strerror}") from error
        except FormatError as error:
            raise VerificationError(str(error)) from error
        try:
            return info, os_image_hash(_read(folder / CHECKSUM_FILE))
        except FileNotFoundError:
            return info, b""
        except OSError as error:
            raise VerificationError(
                f"Failed to check legacy image digest: Failed to read {CHECKSUM_FILE}: {error.strerror}"
            ) from error

    # ---- downloading

    async def _download_in_time(self, name: str, folder: Path) -> None:
        lock = self._coming.setdefault(name, asyncio.Lock())  # who wants the same image waits for it
        try:
            async with asyncio.timeout(self._timeout), lock, self._turns:
                if (folder / METADATA_FILE).exists():
                    return
                log.info("downloading image %s", name)
                await self._download(name, folder)
        except TimeoutError as error:
            raise UnverifiableError("Download image timeout: deadline has elapsed") from error
        except (FormatError, OSError) as error:
            cause = error.strerror or str(error) if isinstance(error, OSError) else error
            raise UnverifiableError(f"Failed to download image {name}: {cause}") from error
        finally:
            if not lock.locked():
                self._coming.pop(name, None)

    async def _download(self, name: str, folder: Path) -> None:
        tmp = self._images / "tmp"
        tmp.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="tmp-download-", dir=tmp) as work:
            archive, unpacked = Path(work, "image.tar.gz"), Path(work, "extracted")
            await self._fetch(self._download_url.replace(PLACEHOLDER, name), archive)
            await _in_thread(lambda stopped: self._put_in_place(archive, unpacked, name, folder, stopped))

    def _put_in_place(self, archive: Path, unpacked: Path, name: str, folder: Path, stopped: Stopped) -> None:
        unpacked.mkdir()
        unpack(archive, unpacked, self._limits, stopped)
        admit(unpacked, name, stopped)
        if folder.exists():
            shutil.rmtree(folder)
        unpacked.rename(folder)

    async def _fetch(self, url: str, archive: Path) -> None:
        try:
            with archive.open("wb") as file:
                answer = await self._client.send("GET", url, follow_redirects=True, write=file.write)
        except NoAnswerError as error:
            raise FormatError(f"Failed to download image: error sending request for url ({url}): {error}") from error
        except AnswerTooLongError as error:
            longest = self._limits.archive
            raise FormatError(f"Failed to download image: it is longer than {longest} bytes, url: {url}") from error
        if not 200 <= answer.status < 300:
            raise FormatError(f"Failed to download image: HTTP status {status_line(answer.status)}, url: {url}")


async def _in_thread(work: Callable[[Stopped], T]) -> T:
    """Do blocking work; when cancelled, wait until it has noticed, so that nothing is written any more afterwards."""
    stop = threading.Event()
    task = asyncio.ensure_future(asyncio.to_thread(work, stop.is_set))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait((task,))
        raise
    except StoppedError as error:  # which nobody asked for then
        raise FormatError("unpacking was given up") from error


def _read(path: Path) -> bytes:
    """Read a file of the cache, so much of it as one of ours can have."""
    with path.open("rb") as file:
        return file.read(_MAX_CACHED)
