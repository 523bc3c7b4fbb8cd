"""A client of a container registry, as far as OS images of a VMM need it: tags, manifests, layers.

Requests go over TLS, with a token if the registry demands one; there are no other credentials. Limits, and the refusal
of a repository without a host, are this emulator's. Source: dstack `vmm/src/app/registry.rs` at 312dc605; the OCI
distribution specification 1.1.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, ValidationError

from dstack_emu.transport.failures import AnswerTooLongError, NoAnswerError
from dstack_emu.transport.http_client import HttpAnswer, HttpClient
from dstack_emu.transport.status import status_line
from dstack_emu.vmm.errors import VmmError

TIMEOUT: Final = 600.0
"""Seconds that a registry has for an answer."""
MAX_LAYER: Final = 1 << 30
"""The maximum size of a layer in bytes."""
MAX_DOCUMENT: Final = 4 << 20
"""The maximum size of a manifest, a token or a list of tags in bytes."""
_MANIFESTS: Final = ", ".join(
    (
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
    )
)
_MAX_INDEXES: Final = 4
_TAG: Final = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]+")
_CHALLENGE: Final = re.compile(r'(realm|service)="([^"]*)"')

Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
M = TypeVar("M", bound=BaseModel)


class Layer(BaseModel):
    """A layer of an image: a tar, gzipped or not; `size` is in bytes."""

    digest: Digest
    size: Annotated[int, Field(ge=0)]


class _Manifest(BaseModel):
    layers: tuple[Layer, ...] = Field(min_length=1)


class _IndexEntry(BaseModel):
    digest: Digest
    media_type: str | None = Field(default=None, alias="mediaType")


class _Index(BaseModel):
    manifests: tuple[_IndexEntry, ...]


class _Tags(BaseModel):
    tags: tuple[str, ...] | None = None


class _Token(BaseModel):
    token: str


def require_tag(tag: str) -> None:
    """Raise `VmmError` for a text that may be no tag of an image, and no part of a folder's name."""
    if not _TAG.fullmatch(tag):
        raise VmmError("invalid registry tag")


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository of a registry: `host` with its port, if it has one, and the path `name`."""

    host: str
    name: str

    @classmethod
    def parse(cls, reference: str) -> "Repository":
        """Parse `HOST/NAME`; a scheme before it has no effect. Raises `VmmError`."""
        trimmed = reference.removeprefix("https://").removeprefix("http://")
        host, slash, name = trimmed.partition("/")
        if not slash:
            raise VmmError("invalid image reference: no repository path")
        if not name:
            raise VmmError("invalid image reference: empty repository")
        if "." not in host and ":" not in host:
            raise VmmError(f"invalid image reference: the host of a registry expected before {trimmed!r:.200}")
        return cls(host, name)


class RegistryClient:
    """Asks one registry for one repository. Close it."""

    def __init__(self, repository: Repository) -> None:
        self._name = repository.name
        self._base = f"https://{repository.host}/v2/"
        self._host = repository.host
        self._documents = HttpClient(timeout=TIMEOUT, max_answer=MAX_DOCUMENT)
        self._layers = HttpClient(timeout=TIMEOUT, max_answer=MAX_LAYER, unpacks=False)

    async def close(self) -> None:
        """Close all connections."""
        await self._documents.close()
        await self._layers.close()

    async def tags(self) -> tuple[str, ...]:
        """Return the tags of the repository; raise `VmmError`."""
        url, after = f"{self._base}{self._name}/tags/list", ""
        answer = await self._get(url, "failed to fetch registry tags")
        if answer.status == 401:
            token = await self.token()
            if token is None:
                raise VmmError("registry requires authentication but token exchange failed")
            answer, after = await self._get(url, "failed to fetch registry tags with token", token), " after auth"
        if not 200 <= answer.status < 300:
            raise VmmError(f"registry returned HTTP {status_line(answer.status)}{after}: {_text(answer)}")
        found = _parsed(_Tags, answer.body)
        if found is None:
            raise VmmError("failed to parse registry tag list")
        return found.tags or ()

    async def token(self) -> str | None:
        """Return a token with which the repository may be read; None if none is needed, or none was given."""
        try:
            probed = await self._get(self._base, "")
            if probed.status != 401:
                return None
            challenge = dict(_CHALLENGE.findall(probed.headers.get("www-authenticate", "")))
            realm, service = challenge.get("realm") or f"{self._base}token", challenge.get("service", self._host)
            if urlsplit(realm).scheme not in ("http", "https"):
                return None
            answer = await self._get(f"{realm}?service={service}&scope=repository:{self._name}:pull", "")
        except VmmError:
            return None
        found = _parsed(_Token, answer.body) if 200 <= answer.status < 300 else None
        return None if found is None else found.token

    async def layers(self, tag: str, token: str | None) -> tuple[Layer, ...]:
        """Return the layers of a tag, of the first image if there is one for each platform; raise `VmmError`."""
        reference = tag
        for _ in range(_MAX_INDEXES):
            url = f"{self._base}{self._name}/manifests/{reference}"
            answer = await self._get(url, "failed to fetch manifest", token, accept=_MANIFESTS)
            if not 200 <= answer.status < 300:
                raise VmmError(f"failed to fetch manifest: HTTP {status_line(answer.status)} {_text(answer)}")
            manifest, index = _parsed(_Manifest, answer.body), _parsed(_Index, answer.body)
            if manifest is not None:
                return manifest.layers
            entries = index.manifests if index is not None else ()
            images = [entry.digest for entry in entries if "attestation" not in (entry.media_type or "")]
            if not images:
                break
            reference = images[0]
        raise VmmError("unsupported manifest format")

    async def fetch(self, layer: Layer, token: str | None, path: Path) -> None:
        """Write a layer into a file, and verify its size and its digest; raise `VmmError`, or `OSError`."""
        url = f"{self._base}{self._name}/blobs/{layer.digest}"
        hashed, size = hashlib.sha256(), 0
        with path.open("wb") as file:

            def write(piece: bytes) -> None:
                nonlocal size
                size += len(piece)
                hashed.update(piece)
                file.write(piece)

            try:
                answer = await self._layers.send("GET", url, headers=_authorization(token), write=write)
                if 300 <= answer.status < 400 and (location := answer.headers.get("location")):
                    # The token is for this registry alone.
                    answer = await self._layers.send("GET", location, follow_redirects=True, write=write)
            except AnswerTooLongError as error:
                raise VmmError(f"failed to read blob body: it is longer than {MAX_LAYER} bytes") from error
            except NoAnswerError as error:
                step = "failed to read blob body" if size else f"failed to download layer {layer.digest}"
                raise VmmError(f"{step}: {error}") from error
        if not 200 <= answer.status < 300:
            raise VmmError(f"failed to download blob {layer.digest}: HTTP {status_line(answer.status)}")
        if size != layer.size:
            raise VmmError(f"blob {layer.digest} size mismatch: expected {layer.size}, received {size}")
        if (received := f"sha256:{hashed.hexdigest()}") != layer.digest:
            raise VmmError(f"blob digest mismatch: expected {layer.digest}, received {received}")

    async def _get(self, url: str, what: str, token: str | None = None, *, accept: str = "") -> HttpAnswer:
        headers = {**_authorization(token), **({"Accept": accept} if accept else {})}
        try:
            return await self._documents.send("GET", url, headers=headers, follow_redirects=not token)
        except (NoAnswerError, AnswerTooLongError, ValueError) as error:
            raise VmmError(f"{what}: {error}") from error


def _authorization(token: str | None) -> dict[str, str]:
    return {} if token is None else {"Authorization": f"Bearer {token}"}


def _parsed(kind: type[M], body: bytes) -> M | None:
    try:
        return kind.model_validate_json(body)
    except ValidationError:
        return None


def _text(answer: HttpAnswer) -> str:
    return answer.body.decode(errors="replace")[:500]
