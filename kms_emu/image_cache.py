"""ClearImageCache: operators remove downloaded images, and what was measured of them, from the cache folder.

The releases offer it in two places. In next it is an RPC of the admin listener, behind a token in a header; in 0.5.x
one of the main listener, with the token as a field whose SHA-256 is in the configuration. They differ in words, too,
and in whether a cache that is not there can be cleared. Source: dstack `kms/src/main_service.rs` (`remove_cache`) at
312dc605 and 40eaf35e.
"""

import hashlib
import hmac
import shutil
from dataclasses import dataclass
from pathlib import Path
from string import hexdigits
from typing import Any, Final

from google.protobuf.empty_pb2 import Empty

from dstack_emu.attest.proto import kms_pb2 as pb
from dstack_emu.attest.proto import kms_v05_pb2 as pb_v05
from dstack_emu.kms_emu.errors import InvalidRequestError, KmsError, NotAttestedError, context
from dstack_emu.transport.service import Rpc, without_context

ALL: Final = "all"


@dataclass(frozen=True, slots=True)
class ImageCache:
    """One cache folder: `images` and `measurements`, an entry for each hash."""

    folder: Path

    async def clear(self, request: pb.ClearImageCacheRequest) -> Empty:
        """Remove what the request names, as next does."""
        with context("failed to clear image cache"):
            self._remove("images", request.image_hash, "invalid cache key")
        with context("failed to clear measurement cache"):
            self._remove("measurements", request.config_hash, "invalid cache key")
        return Empty()

    async def clear_v05(self, request: pb_v05.ClearImageCacheRequest) -> Empty:
        """Remove what the request names, as 0.5.x does: a cache that is not there cannot be cleared whole."""
        with context("Failed to clear image cache"):
            self._remove("images", request.image_hash, "Invalid cache key", must_exist=True)
        with context("Failed to clear measurement cache"):
            self._remove("measurements", request.config_hash, "Invalid cache key", must_exist=True)
        return Empty()

    def _remove(self, kind: str, key: str, invalid: str, *, must_exist: bool = False) -> None:
        """Remove one entry named in hex, all of them, or nothing (empty); no other name reaches the file system."""
        if not key:
            return
        if key != ALL and not all(c in hexdigits for c in key):
            raise InvalidRequestError(invalid)
        path = self.folder / kind if key == ALL else self.folder / kind / key
        if not path.exists() and key != ALL:
            path = path.with_suffix(".json")  # what a measurement is kept as
        try:
            if path.is_dir() or (key == ALL and must_exist):
                shutil.rmtree(path)
            elif path.is_file():
                path.unlink()
        except OSError as error:
            raise KmsError(f"failed to remove directory `{path}`: {error.strerror}") from error


def admin_listener_rpc(cache: ImageCache) -> Rpc[Any, Any, Any]:
    """Return the RPC of next's admin listener."""
    return Rpc("ClearImageCache", pb.ClearImageCacheRequest, Empty, without_context(cache.clear))


def main_listener_rpc(cache: ImageCache, token_hash: str) -> Rpc[object, pb_v05.ClearImageCacheRequest, Empty]:
    """Return the RPC of 0.5.x's main listener; `token_hash` is the SHA-256 of the token in lowercase hex."""

    async def clear(request: pb_v05.ClearImageCacheRequest) -> Empty:
        given = hashlib.sha256(request.token.encode()).hexdigest()
        if not hmac.compare_digest(given, token_hash):
            raise NotAttestedError("Invalid token")
        return await cache.clear_v05(request)

    return Rpc("ClearImageCache", pb_v05.ClearImageCacheRequest, Empty, without_context(clear))
