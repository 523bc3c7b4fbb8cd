"""OS images that are pulled from a registry into the folder of images: in the background, whole or not at all.

Source: dstack `vmm/src/main_service.rs` and `vmm/src/app/registry.rs` at 312dc605.
"""

import asyncio
import functools
import shutil
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.os_image import METADATA_FILE
from dstack_emu.attest.proto import vmm_pb2 as pb
from dstack_emu.transport.background import begin_in_background
from dstack_emu.transport.events import EventLog
from dstack_emu.transport.image_archive import Limits, Stopped, in_thread, is_gzip, unpack
from dstack_emu.vmm.config import ImageSection
from dstack_emu.vmm.errors import VmmError
from dstack_emu.vmm.registry import RegistryClient, Repository, require_tag

MAX_FAILURES: Final = 256
"""How many failed pulls are remembered."""
UNFINISHED: Final = ".tmp-pull-"
"""What the name of a folder begins with while an image is pulled into it."""


class ImagePulls:
    """The pulls of one VMM. Close them."""

    def __init__(self, section: ImageSection, log: EventLog) -> None:
        self._folder, self._registry, self._log = section.path, section.registry, log
        self._running: dict[str, asyncio.Task[None]] = {}
        self._failed: dict[str, str] = {}
        self._turn = asyncio.Lock()

    async def tags(self, local_names: Callable[[], Collection[str]]) -> list[pb.RegistryImageInfo]:
        """List the tags of the registry, none without one; `local_names` returns the names of the local images."""
        if not self._registry:
            return []
        try:
            async with _opened(self._registry) as client:
                tags = await client.tags()
        except VmmError as error:
            raise VmmError(f"failed to list registry tags: {error}") from error
        local = local_names()  # after the answer: a pull may have ended meanwhile
        return [
            pb.RegistryImageInfo(
                tag=tag, local=_name(tag) in local, pulling=tag in self._running, error=self._failed.get(tag, "")
            )
            for tag in tags
            if not tag.startswith("sha256-")
        ]

    def start(self, tag: str) -> None:
        """Begin to pull an image; raise `VmmError` without a registry, or if it is being pulled."""
        if not self._registry:
            raise VmmError("image registry is not configured")
        if tag in self._running:
            raise VmmError(f"image {tag} is already being pulled")
        self._failed.pop(tag, None)
        self._running[tag] = begin_in_background(self._pull(tag), f"pull of an image {tag:.80}")

    async def close(self) -> None:
        """End all pulls; nothing is left of them."""
        tasks = tuple(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _pull(self, tag: str) -> None:
        try:
            require_tag(tag)
            async with self._turn:
                await self._pull_into_folder(tag)
        except (VmmError, OSError) as error:
            text = f"{error.strerror or error}" if isinstance(error, OSError) else str(error)
            self._log.error("image not pulled", tag=tag[:128], reason=text)
            self._failed[tag] = text
            while len(self._failed) > MAX_FAILURES:
                self._failed.pop(next(iter(self._failed)))
        else:
            self._log.info("image pulled", tag=tag)
        finally:
            self._running.pop(tag, None)

    async def _pull_into_folder(self, tag: str) -> None:
        async with _opened(self._registry) as client:
            token = await client.token()
            layers = await client.layers(tag, token)
            image, work = self._folder / _name(tag), self._folder / f"{UNFINISHED}{tag}"
            if image.exists():
                raise VmmError(f"image directory already exists: {image}")
            shutil.rmtree(work, ignore_errors=True)  # of a pull that was killed
            try:
                (work / "image").mkdir(parents=True)
                for layer in layers:
                    await client.fetch(layer, token, work / "layer")
                    await in_thread(functools.partial(_add_layer, work))
                if not (work / "image" / METADATA_FILE).is_file():
                    raise VmmError(f"pulled image does not contain {METADATA_FILE} - not a valid dstack guest image")
                (work / "image").rename(image)
            finally:
                shutil.rmtree(work, ignore_errors=True)


@asynccontextmanager
async def _opened(reference: str) -> AsyncIterator[RegistryClient]:
    client = RegistryClient(Repository.parse(reference))
    try:
        yield client
    finally:
        await client.close()


def _name(tag: str) -> str:
    """Return the name of the local image of a tag."""
    return tag if tag.startswith("dstack-") else f"dstack-{tag}"


def _add_layer(work: Path, stopped: Stopped) -> None:
    """Unpack a layer, and move its files over those of the layers before."""
    archive, unpacked = work / "layer", work / "files"
    with archive.open("rb") as file:
        kind = "gzipped tar" if is_gzip(file) else "tar"
    unpacked.mkdir()
    try:
        unpack(archive, unpacked, Limits(), stopped, takes_plain=True)
    except FormatError as error:
        raise VmmError(f"failed to extract {kind} layer: {error}") from error
    for found in sorted(unpacked.rglob("*")):
        if found.is_file():
            target = work / "image" / found.relative_to(unpacked)
            target.parent.mkdir(parents=True, exist_ok=True)
            found.replace(target)
    shutil.rmtree(unpacked)
