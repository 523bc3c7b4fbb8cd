"""ClearImageCache through both of its doors: 0.5.x's main listener, and next's admin listener."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from dstack_emu.attest.release import RELEASES, Release
from tests.commands import serving
from tests.kms_process import Kms, World, running, variables

TOKEN = "the operator's ✓ token"
IMAGE, CONFIG = "ab" * 32, "cd" * 32


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """One agent with its PCCS."""
    with serving("agent") as description:
        yield World.of(description)


@pytest.fixture(scope="module")
def kms(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kms]:
    """A KMS of 0.5 in its runtime phase, whose configuration opens both doors."""
    folder = tmp_path_factory.mktemp("kms")
    keys = {
        "core.admin_token_hash": hashlib.sha256(TOKEN.encode()).hexdigest().upper(),
        "core.image.cache_dir": str(folder / "cache"),
        "core.onboard.auto_bootstrap_domain": "kms.example.test",
        "core.admin.enabled": "true",
        "core.admin.port": "0",
        "core.admin.auth_token": TOKEN,
    }
    with running(folder, world, "--release", "0.5", **variables(keys)) as started:
        yield started


@pytest.fixture
def cache(kms: Kms) -> Path:
    """A cache with two images and two measurements, one of the latter a plain file."""
    folder = kms.certs.parent / "cache"
    for name in (f"images/{IMAGE}", f"images/{CONFIG}", f"measurements/{CONFIG}"):
        (folder / name / "deep").mkdir(parents=True, exist_ok=True)
    (folder / "measurements" / IMAGE).write_text("{}")
    (folder / "kept").write_text("")
    return folder


def entries(cache: Path) -> set[str]:
    return {str(path.relative_to(cache)) for path in cache.glob("*/*")}


ALL = {f"images/{IMAGE}", f"images/{CONFIG}", f"measurements/{IMAGE}", f"measurements/{CONFIG}"}


def clear(kms: Kms, **request: str) -> tuple[int, object]:
    """0.5.x's call, in JSON."""
    return kms.rpc("KMS.ClearImageCache", {"token": TOKEN, **request})


def admin_clear(kms: Kms, *arguments: str, **request: str) -> tuple[int, str]:
    """next's call, in JSON, with headers of its own."""
    path = "/prpc/Admin.ClearImageCache?json"
    return kms.curl(path, "-d", json.dumps(request), *arguments, url=kms.description["admin_url"])


def test_main_listener_removes_what_is_named(kms: Kms, cache: Path) -> None:
    assert clear(kms, image_hash=IMAGE) == (200, None)
    assert entries(cache) == ALL - {f"images/{IMAGE}"}
    assert clear(kms, config_hash=IMAGE.upper()) == (200, None)
    assert clear(kms, config_hash=IMAGE) == (200, None)
    assert entries(cache) == {f"images/{CONFIG}", f"measurements/{CONFIG}"}
    assert clear(kms, image_hash="all", config_hash="all") == (200, None)
    assert sorted(path.name for path in cache.iterdir()) == ["kept"]


def test_main_listener_reads_the_numbers_of_0_5(kms: Kms, cache: Path) -> None:
    def field(number: int, text: str) -> str:
        return bytes((number << 3 | 2, len(text.encode()))).hex() + text.encode().hex()

    path = kms.certs.parent / "request"
    path.write_bytes(bytes.fromhex(field(1, TOKEN) + field(2, IMAGE) + field(3, CONFIG)))
    answer = kms.curl("/prpc/KMS.ClearImageCache", "--data-binary", f"@{path}", url=kms.runtime_url)
    assert answer == (200, "")
    assert entries(cache) == {f"images/{CONFIG}", f"measurements/{IMAGE}"}


@pytest.mark.parametrize("token", ["", "wrong", hashlib.sha256(TOKEN.encode()).hexdigest()])
def test_main_listener_refuses_another_token(kms: Kms, cache: Path, token: str) -> None:
    refusal = (400, {"error": "Invalid token"})
    assert kms.rpc("KMS.ClearImageCache", {"token": token, "image_hash": "all"}) == refusal
    assert kms.rpc("KMS.ClearImageCache", {"image_hash": "all"}) == refusal
    assert entries(cache) == ALL


@pytest.mark.parametrize("key", ["..", "../images", "/", "ab/cd", "ALL", "ab ", "٣"])
def test_no_other_name_reaches_the_file_system(kms: Kms, cache: Path, key: str) -> None:
    said = {"error": "Failed to clear image cache: Invalid cache key"}
    assert clear(kms, image_hash=key, config_hash="all") == (400, said)
    said = {"error": "Failed to clear measurement cache: Invalid cache key"}
    assert clear(kms, config_hash=key) == (400, said)
    status, answer = admin_clear(kms, "-H", f"X-Admin-Token: {TOKEN}", image_hash=key)
    assert (status, json.loads(answer)) == (400, {"error": "failed to clear image cache: invalid cache key"})
    assert entries(cache) == ALL


def test_cache_that_is_not_there_can_be_cleared_in_next_alone(kms: Kms, cache: Path) -> None:
    assert clear(kms, image_hash="all", config_hash="all") == (200, None)
    status, refusal = clear(kms, image_hash="all")
    missing = f"failed to remove directory `{cache / 'images'}`: No such file or directory"
    assert (status, refusal) == (400, {"error": f"Failed to clear image cache: {missing}"})
    assert admin_clear(kms, "-H", f"X-Admin-Token: {TOKEN}", image_hash="all") == (200, "null")


def test_admin_listener_takes_the_token_in_a_header(kms: Kms, cache: Path) -> None:
    ascii_only = f"X-Admin-Token: {TOKEN}", f"Authorization: Bearer {TOKEN}"
    for number, header in enumerate(ascii_only):
        name = (IMAGE, CONFIG)[number]
        assert admin_clear(kms, "-H", header, image_hash=name) == (200, "null")
    assert admin_clear(kms, "-u", f"anyone:{TOKEN}", config_hash=IMAGE) == (200, "null")
    assert admin_clear(kms, "-u", f"{TOKEN}:", config_hash="all") == (200, "null")
    assert entries(cache) == set()


@pytest.mark.parametrize(
    "arguments",
    [(), ("-H", "X-Admin-Token: wrong"), ("-H", b"X-Admin-Token: \xff"), ("-u", "a:b"), ("-u", f"{TOKEN}:x")],
)
def test_admin_listener_refuses_another_token(kms: Kms, cache: Path, arguments: tuple[str, ...]) -> None:
    assert admin_clear(kms, *arguments, image_hash="all") == (401, "")
    assert admin_clear(kms, *arguments, token=TOKEN, image_hash="all") == (401, "")
    assert entries(cache) == ALL
    refusals = [line for line in kms.log() if "listener=admin" in line]
    assert refusals
    assert not any(TOKEN in line for line in kms.log())


@pytest.mark.parametrize("release", RELEASES.values(), ids=lambda each: each.name)
def test_main_listener_without_a_hash_knows_no_such_call(world: World, tmp_path: Path, release: Release) -> None:
    domain = variables({"core.onboard.auto_bootstrap_domain": "kms.example.test"})
    with running(tmp_path, world, "--release", release.name, **domain) as kms:
        unknown = {"error": "Service not found: ClearImageCache"}
        answer = kms.rpc("KMS.ClearImageCache", {"token": "", "image_hash": "all"})
        assert answer == (release.unknown_method_status, unknown)
        assert kms.description["admin_url"] is None
