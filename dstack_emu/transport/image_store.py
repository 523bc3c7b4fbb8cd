"""Verifies evidence against its OS image, for the KMS and for the verifier.

The lite variant needs only the evidence. The legacy variant needs the image, which is downloaded and kept, and the
registers of the VM, which depend on QEMU's ACPI tables. There is no QEMU here, so the registers must be in the cache of
measurements already.

The cache has upstream's layout, so that both programs can use it: `images/<os_image_hash>/` contains an image's files,
`images/tmp/` the downloads in progress, and `measurements/<key>.json` registers. Nothing is ever deleted from it: that
is up to the operator.

Source of truth: `CvmVerifier` of dstack `dstack/verifier/src/verification.rs` at 312dc605.
"""

import asyncio
import logging
import shutil
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dstack_emu.attest.cache import Memo
from dstack_emu.attest.errors import FormatError, UnverifiableError, VerificationError
from dstack_emu.attest.image import MEASUREMENT_VERSIONS, AcpiDigests, ImageMeasurement, Registers, os_image_hash
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
from dstack_emu.transport.http_client import HttpClient, Route, direct
from dstack_emu.transport.image_archive import Limits, Stopped, in_thread, unpack, verify_image_files
from dstack_emu.transport.status import status_line
from dstack_emu.transport.urls import shown_url

PLACEHOLDER: Final = "{OS_IMAGE_HASH}"
"""The part of a download URL that is replaced by the image's hash in hex."""

_HASH_SIZE: Final = 32
_AT_ONCE: Final = 4  # simultaneous downloads: a caller chooses the image, and must not fill the disk
_MAX_CACHED: Final = 1024 * 1024

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ImageVerdict:
    """The registers are those of the image in this VM config; in the legacy variant ACPI tables are verified, too."""

    vm_config: VmConfig
    acpi_tables_verified: bool


class ImageStore:
    """Verifies boots against their images, with a cache in a folder. Close it to close its connections.

    `download_url` contains PLACEHOLDER; `timeout` is for a whole download, in seconds. `documents` are the versions of
    the measurement document that are read.
    """

    def __init__(
        self,
        cache_dir: Path,
        download_url: str,
        timeout: float,
        limits: Limits | None = None,
        *,
        route: Route = direct,
        documents: Collection[int] = MEASUREMENT_VERSIONS,
    ) -> None:
        self._images, self._measurements = cache_dir / "images", cache_dir / "measurements"
        self._download_url, self._timeout = download_url, timeout
        self._limits = limits or Limits()
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._coming: dict[str, asyncio.Lock] = {}
        # An archive may be served with Content-Encoding gzip; the client must not decompress it.
        self._client = HttpClient(timeout=timeout, max_answer=self._limits.archive, unpacks=False, route=route)
        # Many VMs boot one image in the same way, and each calls often.
        self._documents = documents
        self._read_config = Memo(self._parse, lambda text, _: 3 * len(text), max_entries=256, max_bytes=4 << 20)
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
        """Verify MRTD and RTMR0 to 2 by computing them; a request's `vm_config` overrides that of the evidence.

        `on_image` is called with the image's metadata once it is available, whatever the result is. Raises
        `VerificationError` with upstream's text.
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

    def _parse(self, text: str) -> tuple[VmConfig, ImageMeasurement | None]:
        """Parse a VM config and its measurement document, which is None for the legacy variant."""
        config = decode_vm_config(text)
        lite = config.tdx_attestation_variant == "lite"
        return config, lite_measurement(config, self._documents) if lite else None

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

    async def _image(self, image_hash: bytes) -> tuple[ImageInfo, bytes]:
        """Download an image if it is not in the cache; return its metadata, and the hash of its checksum file there."""
        name = image_hash.hex()
        folder = self._images / name
        # A hash of another size names no image; an empty one would be the folder of all images.
        if len(image_hash) != _HASH_SIZE:
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
        lock = self._coming.setdefault(name, asyncio.Lock())  # calls for the same image wait for it
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
            await in_thread(lambda stopped: self._put_in_place(archive, unpacked, name, folder, stopped))

    def _put_in_place(self, archive: Path, unpacked: Path, name: str, folder: Path, stopped: Stopped) -> None:
        unpacked.mkdir()
        unpack(archive, unpacked, self._limits, stopped)
        verify_image_files(unpacked, name, stopped)
        if folder.exists():
            shutil.rmtree(folder)
        unpacked.rename(folder)

    async def _fetch(self, url: str, archive: Path) -> None:
        shown = shown_url(url)
        try:
            with archive.open("wb") as file:
                answer = await self._client.send("GET", url, follow_redirects=True, write=file.write)
        except NoAnswerError as error:
            raise FormatError(f"Failed to download image: error sending request for url ({shown}): {error}") from error
        except AnswerTooLongError as error:
            longest = self._limits.archive
            raise FormatError(f"Failed to download image: it is longer than {longest} bytes, url: {shown}") from error
        if not 200 <= answer.status < 300:
            raise FormatError(f"Failed to download image: HTTP status {status_line(answer.status)}, url: {shown}")


def _read(path: Path) -> bytes:
    """Read a file of the cache, at most as many bytes as a valid one has."""
    with path.open("rb") as file:
        return file.read(_MAX_CACHED)
