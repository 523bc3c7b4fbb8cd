"""auth-simple's configuration file: replaced, rewritten, broken, not readable, and what `GET /` tells of it."""

import errno
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from aiohttp.test_utils import TestClient, TestServer

from dstack_emu.auth.boot_info import parse_boot_info
from dstack_emu.auth.config_file import read_config
from dstack_emu.auth.server import simple_app
from dstack_emu.auth.simple import SimpleAuth
from tests.auth_simple import (
    ALLOWED,
    BOOT_INFO,
    CONFIG,
    ZERO,
    ask,
    config_with,
    decide,
    denied,
    info,
    write,
    write_text,
)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write(tmp_path / "auth-config.json", CONFIG)


def replace_in_place(path: Path, old: str, new: str) -> None:
    """Change the content and nothing that a `stat` shows: same inode, size and time."""
    before = path.stat()
    path.write_text(path.read_text().replace(old, new))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (before.st_size, before.st_mtime_ns, before.st_ino) == (
        after.st_size,
        after.st_mtime_ns,
        after.st_ino,
    )


async def test_config_replaced_between_two_requests_takes_effect(config: Path) -> None:
    async with TestClient(TestServer(simple_app(config))) as client:
        assert await ask(client, "app") == ALLOWED
        replacement = write(config.with_name("new.json"), config_with(apps={}, gatewayAppId="0x9b"))
        os.replace(replacement, config)
        assert await ask(client, "app") == denied("app not registered", "0x9b")
        write(config, CONFIG)
        assert await ask(client, "app") == ALLOWED


async def test_config_rewritten_with_same_size_and_time_takes_effect(config: Path) -> None:
    async with TestClient(TestServer(simple_app(config))) as client:
        assert await ask(client, "app") == ALLOWED
        replace_in_place(config, '"0xc0"', '"0xc1"')
        assert await ask(client, "app") == denied("compose hash not allowed")


def test_unchanged_config_is_read_but_not_parsed_again(config: Path) -> None:
    service = SimpleAuth(config)
    first = service.policy()
    write(config, CONFIG)
    assert service.policy() is first
    write(config, config_with(gatewayAppId="0x9b"))
    assert service.policy().gateway_app_id == "0x9b"


def test_config_written_in_place_within_a_tick_of_the_files_clock_is_not_read_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real, states = tmp_path / "config", os.fstat, list[os.stat_result]()
    path.write_bytes(b"newold")

    def fstat(descriptor: int) -> os.stat_result:
        """The file's clock ticks after the second look at it, before which the rest is written."""
        states.append(real(descriptor))
        if len(states) == 2:
            path.write_bytes(b"newnew")
            return states[0]
        return states[-1]

    monkeypatch.setattr(os, "fstat", fstat)
    assert read_config(str(path)) == b"newnew"


async def test_config_that_appears_vanishes_and_returns_takes_effect(tmp_path: Path) -> None:
    path = tmp_path / "later.json"
    async with TestClient(TestServer(simple_app(path))) as client:
        missing = denied(f"config file not found: {path}", "")
        assert await ask(client, "kms") == missing
        write(path, CONFIG)
        assert await ask(client, "kms") == ALLOWED
        os.remove(path)
        assert await ask(client, "kms") == missing
        write(path, CONFIG)
        assert await ask(client, "kms") == ALLOWED


async def test_config_broken_after_a_good_one_denies_and_the_good_one_is_not_remembered(config: Path) -> None:
    async with TestClient(TestServer(simple_app(config))) as client:
        assert await ask(client, "kms") == ALLOWED
        write_text(config, "{")
        for _ in range(2):
            assert not (await ask(client, "kms"))["isAllowed"]
        write(config, CONFIG)
        assert await ask(client, "kms") == ALLOWED


def test_half_written_config_denies_at_every_length(config: Path) -> None:
    """Every beginning of a file that allows, short of the whole, denies: by the file, not by a rule."""
    content = config.read_bytes()
    service = SimpleAuth(config)
    boot_info = parse_boot_info(BOOT_INFO)
    assert service.decide(boot_info, is_kms=False).is_allowed
    for length in range(len(content)):
        config.write_bytes(content[:length])
        decision = service.decide(boot_info, is_kms=False)
        assert (decision.is_allowed, decision.rule, decision.gateway_app_id) == (False, "config", "")
        assert decision.reason.startswith(f"failed to load config: {config}: Invalid JSON: ")


async def test_half_written_config_denies_over_http(config: Path) -> None:
    write_text(config, json.dumps(CONFIG)[:40])
    answer = await decide(config, "app")
    assert (answer["isAllowed"], answer["gatewayAppId"]) == (False, "")
    assert answer["reason"].startswith(f"failed to load config: {config}: Invalid JSON: ")


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        ("", "Invalid JSON: "),
        ("auth", "Invalid JSON: "),
        ('{"osImages": [],}', "Invalid JSON: "),
        ("{} {}", "Invalid JSON: "),
        ('{"chainId": NaN}', "Invalid JSON: NaN is not JSON"),
        ('{"unknown": Infinity}', "Invalid JSON: Infinity is not JSON"),
        ("\ufeff{}", "Invalid JSON: "),
        ("[]", "Input should be an object"),
        ("null", "Input should be an object"),
        ('"x"', "Input should be an object"),
        ('{"osImages": "0x00"}', "osImages: Input should be a valid array"),
        ('{"osImages": null}', "osImages: Input should be a valid array"),
        ('{"osImages": ["0x00", 1]}', "osImages.1: Input should be a valid string"),
        ('{"osImages": [1, 2, 3]}', "osImages.0: Input should be a valid string (and 2 more)"),
        ('{"gatewayAppId": 1}', "gatewayAppId: Input should be a valid string"),
        ('{"gatewayAppId": null}', "gatewayAppId: Input should be a valid string"),
        ('{"kmsContractAddr": []}', "kmsContractAddr: Input should be a valid string"),
        ('{"chainId": "1"}', "chainId: Input should be a valid integer"),
        ('{"chainId": 1.5}', "chainId: Input should be a valid integer"),
        ('{"chainId": true}', "chainId: Input should be a valid integer"),
        ('{"chainId": -1}', "chainId: Input should be greater than or equal to 0"),
        ('{"chainId": 18446744073709551616}', "chainId: Input should be less than 18446744073709551616"),
        ('{"kms": []}', "kms: Input should be an object"),
        ('{"kms": null}', "kms: Input should be an object"),
        ('{"kms": {"mrAggregated": {}}}', "kms.mrAggregated: Input should be a valid array"),
        ('{"kms": {"allowAnyDevice": "true"}}', "kms.allowAnyDevice: Input should be a valid boolean"),
        ('{"kms": {"allowAnyDevice": 1}}', "kms.allowAnyDevice: Input should be a valid boolean"),
        ('{"kms": {"allowAnyDevice": null}}', "kms.allowAnyDevice: Input should be a valid boolean"),
        ('{"apps": []}', "apps: Input should be an object"),
        ('{"apps": {"0xa0": []}}', "apps.0xa0: Input should be an object"),
        ('{"apps": {"0xa0": {"devices": "0xd0"}}}', "apps.0xa0.devices: Input should be a valid array"),
        ('{"allowedTcbStatuses": "UpToDate"}', "allowedTcbStatuses: Input should be a valid array"),
        ('{"allowedAdvisoryIds": [null]}', "allowedAdvisoryIds.0: Input should be a valid string"),
    ],
)
async def test_broken_config_denies_and_says_what_is_wrong(
    config: Path, content: str, detail: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_text(config, content)
    answer = await decide(config, "kms", "upstream")
    start = f"failed to load config: {config}: {detail}"
    assert (answer["isAllowed"], answer["gatewayAppId"]) == (False, "")
    assert answer["reason"].startswith(start) if detail.endswith(": ") else answer["reason"] == start
    assert ("dstack_emu.auth.simple", logging.ERROR, answer["reason"]) in caplog.record_tuples


async def test_broken_section_denies_even_boots_that_do_not_need_it(config: Path) -> None:
    write(config, config_with(apps={**CONFIG["apps"], "0xa1": {"devices": None}}))
    answer = await decide(config, "kms")
    expected = f"failed to load config: {config}: apps.0xa1.devices: Input should be a valid array"
    assert answer == denied(expected, "")


def _directory(path: Path) -> Path:
    path.mkdir()
    return path


def _fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _loop(path: Path) -> Path:
    path.symlink_to(path)
    return path


def _below_a_file(path: Path) -> Path:
    path.write_text("{}")
    return path / "config.json"


def _long_name(path: Path) -> Path:
    path = path.with_name("a" * 300)
    try:
        path.stat()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            pytest.skip(f"this file system has its own word for a name of 300 letters: {error.strerror}")
    return path


def _unreadable(path: Path) -> Path:
    memory = Path("/proc/self/mem")  # opens, and fails to be read from its beginning
    if not memory.exists():
        pytest.skip(f"{memory} does not exist here")
    path.symlink_to(memory)
    return path


@pytest.mark.parametrize(
    ("make", "detail"),
    [
        (_directory, "Is a directory"),
        (_fifo, "Not a regular file"),
        (_loop, "Too many levels of symbolic links"),
        (_below_a_file, "Not a directory"),
        (_unreadable, "Input/output error"),
        (_long_name, "File name too long"),
        (lambda path: path.with_name("a\0b"), "embedded null byte"),
    ],
)
async def test_config_that_cannot_be_read_denies_and_says_why(
    tmp_path: Path, make: Callable[[Path], Path], detail: str
) -> None:
    path = make(tmp_path / "config.json")
    reason = f"failed to load config: {path}: {detail}"
    assert await decide(path, "app") == denied(reason, "")
    answer = await info(path)
    assert (answer["status"], answer["configError"]) == ("ok", reason)


@contextmanager
def without_privileges() -> Iterator[None]:
    """Read files as an ordinary user does: root may read every one."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public_config(short_folder: Path) -> Path:
    """A config in a folder that any user may enter."""
    short_folder.chmod(0o755)
    path = short_folder / "config.json"
    path.write_text("{}")
    return path


async def test_config_that_its_reader_has_no_permission_for_denies_and_says_why(public_config: Path) -> None:
    path = public_config
    with without_privileges():
        assert "configError" not in await info(path)
    path.chmod(0)
    reason = f"failed to load config: {path}: Permission denied"
    with without_privileges():
        assert await decide(path, "app") == denied(reason, "")
        assert (await info(path))["configError"] == reason


async def test_config_behind_a_symbolic_link_is_read(config: Path) -> None:
    link = config.with_name("link.json")
    link.symlink_to(config.name)
    assert await decide(link, "app") == ALLOWED


# --- info


async def test_info_gives_the_config_s_values(config: Path) -> None:
    values = {"kmsContractAddr": "0x01", "chainId": 8453, "appImplementation": "0x02"}
    write(config, config_with(**values))
    assert await info(config) == {
        "status": "ok",
        "kmsContractAddr": "0x01",
        "gatewayAppId": "0x9a",
        "chainId": 8453,
        "appAuthImplementation": "0x02",
        "appImplementation": "0x02",
        "configPath": str(config),
    }


async def test_info_without_a_usable_config_is_ok_with_zero_values_and_the_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "none.json"
    reason = f"config file not found: {path}"
    assert await info(path) == {
        "status": "ok",
        "kmsContractAddr": ZERO,
        "gatewayAppId": "",
        "chainId": 0,
        "appAuthImplementation": ZERO,
        "appImplementation": ZERO,
        "configPath": str(path),
        "configError": reason,
    }
    assert ("dstack_emu.auth.simple", logging.ERROR, reason) in caplog.record_tuples


async def test_info_after_a_config_broke_shows_none_of_its_values(config: Path) -> None:
    async with TestClient(TestServer(simple_app(config))) as client:
        async with client.get("/") as response:
            assert (await response.json())["gatewayAppId"] == "0x9a"
        write_text(config, "{")
        async with client.get("/") as response:
            assert (await response.json())["gatewayAppId"] == ""


async def test_config_path_keeps_its_spelling(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(config.parent)
    answer = await info("./auth-config.json")
    assert (answer["configPath"], answer["gatewayAppId"]) == ("./auth-config.json", "0x9a")
