"""OS images that a VMM pulls from a registry: what it asks a server of the standard library, and what is left."""

import asyncio
import contextlib
import datetime
import gzip
import hashlib
import http.server
import io
import ipaddress
import json
import ssl
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from dstack_emu.attest.proto import vmm_pb2 as pb
from dstack_emu.attest.release import DEFAULT
from dstack_emu.simulator.image import OsImage
from dstack_emu.vmm.config import ImageSection, VmmConfig
from dstack_emu.vmm.errors import VmmError
from dstack_emu.vmm.fleet import Fleet
from dstack_emu.vmm.service import VmmService
from tests.test_vmm_lifecycle import IdleMachines, turns

INDEX = "application/vnd.oci.image.index.v1+json"
METADATA = OsImage.from_seed(lambda name, size: bytes(size)).files["metadata.json"]


def tar(**files: bytes) -> bytes:
    """A tar of files, whose names have `_` for dots."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name.replace("_", "."))
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@dataclass
class Registry:
    """What a registry answers by path, and what it was asked; with `token` it answers nobody else."""

    host: str = ""
    token: str = ""
    answers: dict[str, tuple[int, bytes, dict[str, str]]] = field(default_factory=dict)
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    was_asked: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    may_answer: threading.Event = field(default_factory=threading.Event)

    def put(self, tag: str, *layers: bytes, **changed: Any) -> None:
        """Have an image; `changed` are members of its only layer that are wrong."""
        described = [{"digest": digest(each), "size": len(each), **changed} for each in layers]
        self.answers[f"/v2/a/b/manifests/{tag}"] = (200, json.dumps({"layers": described}).encode(), {})
        for each, layer in zip(described, layers, strict=True):
            self.answers[f"/v2/a/b/blobs/{each['digest']}"] = (200, layer, {})
        tags = [path.rpartition("/")[2] for path in self.answers if "/manifests/" in path]
        self.answers["/v2/a/b/tags/list"] = (200, json.dumps({"tags": tags}).encode(), {})

    def answer(self, path: str, authorization: str | None) -> tuple[int, bytes, dict[str, str]]:
        self.asked.append((path, authorization))
        self.was_asked.release()
        self.may_answer.wait(50)
        if path == "/token?service=s&scope=repository:a/b:pull":
            return 200, json.dumps({"token": self.token}).encode(), {}
        if self.token and path.startswith("/v2") and authorization != f"Bearer {self.token}":
            challenge = f'Bearer realm="https://{self.host}/token",service="s"'
            return 401, b"no", {"WWW-Authenticate": challenge}
        return self.answers.get(path, (404, b"absent", {}))


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """A registry over TLS, whose certificate the system trusts."""
    made = Registry()
    made.may_answer.set()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body, headers = made.answer(self.path, self.headers.get("Authorization"))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate(tmp_path))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "server.pem"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        made.host = f"127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield made
        made.may_answer.set()
        server.shutdown()
        thread.join()


def certificate(folder: Path) -> Path:
    """Write a certificate for 127.0.0.1 with its key."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    built = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    built = built.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1)).add_extension(address, True)
    pem = built.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    pem += key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = folder / "server.pem"
    path.write_bytes(pem)
    return path


Make = Callable[[str], VmmService]


@pytest.fixture
async def make(tmp_path: Path) -> "Any":
    """Make a VMM with a registry."""
    fleets: list[Fleet] = []

    def of(reference: str) -> VmmService:
        config = VmmConfig(run_path=tmp_path / "vms", image=ImageSection(path=tmp_path / "images", registry=reference))
        options: dict[str, Any] = {"release": DEFAULT, "clock": lambda: 0.0, "new_id": lambda: "vm"}
        fleets.append(Fleet(config, IdleMachines(), entropy=bytes, **options))
        return VmmService(fleets[-1])

    yield of
    for fleet in fleets:
        await fleet.close()


async def pulled(service: VmmService, tag: str) -> pb.RegistryImageInfo:
    """Pull an image; return what is listed of it when that has ended."""
    await service.pull_registry_image(pb.PullRegistryImageRequest(tag=tag))
    while True:
        (listed,) = [image for image in (await service.list_registry_images()).images if image.tag == tag]
        if not listed.pulling:
            return listed


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


async def test_vmm_without_a_registry_lists_and_pulls_nothing(make: Make) -> None:
    assert list((await make("").list_registry_images()).images) == []
    with pytest.raises(VmmError, match="^image registry is not configured$"):
        await make("").pull_registry_image(pb.PullRegistryImageRequest(tag="1"))


@pytest.mark.parametrize("token", ["", "secret"])
async def test_image_is_pulled_from_an_open_registry_and_from_one_that_wants_a_token(
    make: Make, registry: Registry, tmp_path: Path, token: str
) -> None:
    registry.token = token
    registry.put("0.6.0", gzip.compress(tar(metadata_json=b"{}", rootfs_img=b"r")), tar(metadata_json=METADATA))
    registry.put("sha256-00", b"")
    service = make(f"https://{registry.host}/a/b")
    (listed,) = (await service.list_registry_images()).images
    assert listed == pb.RegistryImageInfo(tag="0.6.0")
    assert await pulled(service, "0.6.0") == pb.RegistryImageInfo(tag="0.6.0", local=True)
    assert names_in(tmp_path / "images") == ["dstack-0.6.0"]
    image = tmp_path / "images/dstack-0.6.0"
    assert {path.name: path.read_bytes() for path in image.iterdir()} == {"metadata.json": METADATA, "rootfs.img": b"r"}
    assert [image.name for image in (await service.list_images()).images] == ["dstack-0.6.0"]
    expected = f"Bearer {token}" if token else None
    assert {given for path, given in registry.asked if "/blobs/" in path or "/manifests/" in path} == {expected}
    again = await pulled(service, "0.6.0")
    assert (again.local, again.error) == (True, f"image directory already exists: {image}")


async def test_image_of_several_platforms_and_a_layer_elsewhere_are_pulled_without_the_token_there(
    make: Make, registry: Registry, tmp_path: Path
) -> None:
    registry.token = "secret"
    layer = tar(metadata_json=METADATA)
    registry.put("inner", layer)
    manifest = registry.answers.pop("/v2/a/b/manifests/inner")
    found = digest(manifest[1])
    registry.answers[f"/v2/a/b/manifests/{found}"] = manifest
    entries = [{"digest": digest(b""), "mediaType": "application/vnd.x.attestation"}, {"digest": found}]
    index = json.dumps({"mediaType": INDEX, "manifests": entries}).encode()
    registry.answers["/v2/a/b/manifests/dstack-1"] = (200, index, {})
    registry.answers["/v2/a/b/tags/list"] = (200, b'{"tags": ["dstack-1"]}', {})
    registry.answers[f"/v2/a/b/blobs/{digest(layer)}"] = (307, b"", {"Location": f"https://{registry.host}/elsewhere"})
    registry.answers["/elsewhere"] = (200, layer, {})
    assert (await pulled(make(f"{registry.host}/a/b"), "dstack-1")).local
    assert ("/elsewhere", None) in registry.asked
    assert names_in(tmp_path / "images") == ["dstack-1"]


GOOD = tar(metadata_json=METADATA)


def link() -> bytes:
    entry = tarfile.TarInfo("metadata.json")
    entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return entry.tobuf() + bytes(1024)


@pytest.mark.parametrize(
    ("layer", "changed", "text"),
    [
        (GOOD, {"size": 1}, f"blob {digest(GOOD)} size mismatch: expected 1, received {len(GOOD)}"),
        (GOOD, {"digest": digest(b"x")}, f"blob digest mismatch: expected {digest(b'x')}, received {digest(GOOD)}"),
        (GOOD, {"digest": "sha256:../../x"}, "unsupported manifest format"),
        (gzip.compress(GOOD)[:40], {}, "failed to extract gzipped tar layer: "),
        (b"x" * 600, {}, "failed to extract tar layer: "),
        (link(), {}, "failed to extract tar layer: "),
        (tar(other=b""), {}, "pulled image does not contain metadata.json - not a valid dstack guest image"),
    ],
    ids=("size", "digest", "no-digest", "gzip", "tar", "link", "metadata"),
)
async def test_image_that_is_not_as_its_manifest_says_leaves_nothing_and_hinders_no_later_pull(
    make: Make, registry: Registry, tmp_path: Path, layer: bytes, changed: dict[str, Any], text: str
) -> None:
    service = make(f"{registry.host}/a/b")
    registry.put("1", layer, **changed)
    failed = await pulled(service, "1")
    assert (failed.local, failed.error[: len(text)]) == (False, text)
    assert names_in(tmp_path / "images") == []
    registry.put("1", GOOD)
    assert await pulled(service, "1") == pb.RegistryImageInfo(tag="1", local=True)


async def test_answers_of_a_registry_that_are_errors_are_the_reason(make: Make, registry: Registry) -> None:
    service = make(f"{registry.host}/a/b")
    with pytest.raises(VmmError, match="^failed to list registry tags: registry returned HTTP 404 Not Found: absent$"):
        await service.list_registry_images()
    registry.put("1", GOOD)
    blob = f"/v2/a/b/blobs/{digest(GOOD)}"
    for path, answer, text in (
        (blob, (404, b"", {}), f"failed to download blob {digest(GOOD)}: HTTP 404 Not Found"),
        (blob, (200, GOOD[:10], {"Content-Length": "20"}), "failed to read blob body: "),
        ("/v2/a/b/manifests/1", (401, b"no", {}), "failed to fetch manifest: HTTP 401 Unauthorized no"),
        ("/v2/a/b/manifests/1", (200, b"{}", {}), "unsupported manifest format"),
    ):
        registry.answers[path] = answer
        assert (await pulled(service, "1")).error.startswith(text)
    registry.answers["/v2/a/b/tags/list"] = (200, b"[]", {})
    with pytest.raises(VmmError, match="^failed to list registry tags: failed to parse registry tag list$"):
        await service.list_registry_images()
    for reference, reason in (
        ("name", "no repository path"),
        ("registry.example/", "empty repository"),
        ("user/name", "the host of a registry expected before 'user/name'"),
    ):
        with pytest.raises(VmmError, match=f"^failed to list registry tags: invalid image reference: {reason}$"):
            await make(reference).list_registry_images()


async def test_tag_that_leads_elsewhere_is_answered_and_asks_nothing(
    make: Make, registry: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = make(f"{registry.host}/a/b")
    for tag in ("", "..", "../x", "a/b", "a b", "é"):
        await service.pull_registry_image(pb.PullRegistryImageRequest(tag=tag))
        await turns()
        assert "invalid registry tag" in caplog.records[-1].getMessage()
    assert len(caplog.records) == 6
    assert registry.asked == []
    assert names_in(tmp_path / "images") == []


async def test_pull_that_is_in_progress_is_listed_and_leaves_nothing_at_the_end(
    make: Make, registry: Registry, tmp_path: Path
) -> None:
    service = make(f"{registry.host}/a/b")
    registry.put("1", GOOD)
    registry.may_answer.clear()
    await service.pull_registry_image(pb.PullRegistryImageRequest(tag="1"))
    with pytest.raises(VmmError, match="^image 1 is already being pulled$"):
        await service.pull_registry_image(pb.PullRegistryImageRequest(tag="1"))
    listing = asyncio.create_task(service.list_registry_images())
    await asyncio.to_thread(registry.was_asked.acquire)
    await service.fleet.pulls.close()
    registry.may_answer.set()
    assert list((await listing).images) == [pb.RegistryImageInfo(tag="1")]
    assert names_in(tmp_path / "images") == []
