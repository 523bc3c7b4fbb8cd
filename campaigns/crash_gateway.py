"""A gateway that is killed with SIGKILL while instances register or its operator changes it, call after call."""

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from campaigns.crash_process import PATIENCE, Process, cut_off
from campaigns.crash_things import left
from dstack_emu.gateway.errors import GatewayConfigError
from dstack_emu.gateway.state import GatewayState
from dstack_emu.gateway.store import Store
from tests.gateway import GatewayClient, TestCa, config_text

CALLS: Final = ("RegisterCvm", "CreateDnsCredential", "AddZtDomain", "DeleteDnsCredential")
NUMBER: Final = 30
"""Calls that are made at most."""
FIRST: Final = 0.02
"""Seconds within which the moments of the first call lie; those of a later one lie within the average of the others."""


class Gateway:
    """A gateway with its folder, which can be started again and again."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._ca = folder, TestCa(folder / "ca", "EMULATED root of a campaign")
        self.log, self._config = folder / "log", folder / "gateway.toml"
        self._config.write_text(config_text(folder, self._ca))

    def start(self, environment: Mapping[str, str] | None = None) -> tuple[Process, GatewayClient]:
        """Start it."""
        process = Process("gateway", "-c", str(self._config), log=self.log, environment=environment)
        return process, GatewayClient(process.description["urls"], self._ca)

    def stored(self) -> GatewayState:
        """Return what is stored."""
        try:
            return Store(self._folder / "data").load()
        except GatewayConfigError as error:
            raise AssertionError(f"the state cannot be read: {error}") from error

    def unfinished(self) -> list[str]:
        """Return what no start and no call has finished."""
        return left(self._folder / "data")

    def register(self, client: GatewayClient, number: int) -> Any:
        """Register an instance, as its guest does."""
        return client.register(self._ca.instance(number.to_bytes(20)), f"key {number}")


def killed(folder: Path, call: str, moment: float) -> str:
    """Kill a gateway at a moment of some calls, from 0 to 1, start it again, and judge."""
    gateway = Gateway(folder)
    process, client = gateway.start()
    default = client.rpc("admin", "CreateDnsCredential", **_credential("default", set_as_default=True))["id"]
    ids: list[str] = []
    if call == "DeleteDnsCredential":
        ids = [_create(client, number) for number in range(NUMBER)]
    calls: dict[str, Callable[[GatewayClient, int], Any]] = {
        "RegisterCvm": gateway.register,
        "CreateDnsCredential": _create,
        "AddZtDomain": add_domain,
        "DeleteDnsCredential": lambda client, number: client.rpc("admin", "DeleteDnsCredential", id=ids[number]),
    }
    answered: list[Any] = []
    steps = threading.Semaphore(0)

    def several() -> None:
        try:
            for number in range(NUMBER):
                answered.append(calls[call](client, number))
                steps.release()
        finally:
            steps.release(NUMBER)

    def wait() -> None:
        began, (whole, part) = time.monotonic(), divmod(moment * NUMBER, 1)
        for _ in range(int(whole)):
            steps.acquire(timeout=PATIENCE)
        time.sleep(part * ((time.monotonic() - began) / whole if whole else FIRST))

    cut_off(process, several, wait)
    stored = gateway.stored()
    done = _done(stored, call, ids)
    assert list(range(len(done))) == done, f"others than the first {len(done)} were stored: {done}"
    assert len(answered) <= len(done) <= len(answered) + 1, f"{len(done)} stored after {len(answered)} answers"
    assert set(stored.certificates) <= set(stored.domains), "a certificate of no domain"
    again, client = gateway.start()
    try:
        found = {each["instance_id"]: each["ip"] for each in client.rpc("admin", "Status")["hosts"]}
        assert found == {name: each.ip for name, each in stored.instances.items()}, "other instances than are stored"
        listed = client.rpc("admin", "ListDnsCredentials")
        assert {each["id"] for each in listed["credentials"]} == set(stored.credentials), "other credentials"
        assert listed["default_id"] == default, "another default credential"
        domains = {each["config"]["domain"] for each in client.rpc("admin", "ListZtDomains")["domains"]}
        assert domains == set(stored.domains), "other domains than are stored"
        if len(done) < NUMBER:
            calls[call](client, len(done))
            assert len(_done(gateway.stored(), call, ids)) == len(done) + 1, "the next call is not stored"
        addresses = [each.ip for each in gateway.stored().instances.values()]
        assert len(addresses) == len(set(addresses)), "an address was given twice"
    finally:
        again.end()
    assert not gateway.unfinished(), f"something unfinished is left: {gateway.unfinished()}"
    return f"{call}: {'some' if answered else 'none'} answered"


def add_domain(client: GatewayClient, number: int) -> Any:
    """Add a domain, whose certificate is then issued."""
    return client.rpc("admin", "AddZtDomain", domain=f"{number}.example", port=443)


def _create(client: GatewayClient, number: int) -> str:
    made: str = client.rpc("admin", "CreateDnsCredential", **_credential(f"credential {number}"))["id"]
    return made


def _credential(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "provider_type": "cloudflare", "cf_api_token": "abcdefghijkl", "cf_zone_id": "z", **more}


def _done(state: GatewayState, call: str, ids: list[str]) -> list[int]:
    """Return the numbers of the calls that are stored."""
    match call:
        case "RegisterCvm":
            return sorted(int(name, 16) for name in state.instances)
        case "AddZtDomain":
            return sorted(int(name.partition(".")[0]) for name in state.domains)
        case "CreateDnsCredential":
            names = (each.name for each in state.credentials.values())
            return sorted(int(name.removeprefix("credential ")) for name in names if name != "default")
    return [number for number, each in enumerate(ids) if each not in state.credentials]
