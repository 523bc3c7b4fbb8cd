"""The clock of a machine that is set back between two starts, by libfaketime; file times stay those of the real clock.

What was stored is there at the earlier time and, once the clock is right again, with what was added meanwhile. What
cannot be done at a time before the vendor's documents is refused with a reason that names the time.
"""

import json
import re
import urllib.error
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from campaigns.crash_gateway import Gateway, add_domain
from campaigns.crash_process import Process, request
from campaigns.determinism import faketime
from tests.vmm import VmmClient, configuration

BACK: Final = ("1h", "1d", "365d", "3000d", "20000d")
"""By how much the clock is set back: the last is in 1972, as that of a machine whose battery is empty."""
VALID: Final = frozenset(("1h", "1d", "365d"))
"""Those after which evidence is valid: the vendor's documents are of 2024."""
EARLY: Final = re.compile(
    r"the clock of this machine is at \S+, before|TCBInfo issue date is in the future|certificate is not yet valid"
)
"""A refusal that names the time: the stack's words, upstream's, which a KMS repeats, and OpenSSL's."""


def set_back(folder: Path, server: str, back: str) -> str:
    """Store something, set the clock back, start again, set it right, start again; return what came of it."""
    library = faketime()
    if library is None:
        return "no libfaketime"
    earlier = {
        "LD_PRELOAD": library,
        "FAKETIME": f"-{back}",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
    }
    said = SERVERS[server](folder, earlier, back)
    log = (folder / "log").read_text() if (folder / "log").exists() else ""
    assert "Traceback" not in log, f"a traceback in the log: {log[-3000:]}"
    return f"{back}: {said}"


def _chain(folder: Path, earlier: Mapping[str, str], _back: str) -> str:
    account = "0x" + "ab" * 20

    def start(environment: Mapping[str, str] | None = None) -> Process:
        options = ("--listen", "127.0.0.1:0", "--state", str(folder / "chain"))
        return Process("chain", *options, log=folder / "log", environment=environment)

    def ask(process: Process, method: str, *params: Any) -> Any:
        url, body = process.description["url"], {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        found = request("POST", url, body)
        assert "result" in found, f"{method} was refused: {found}"
        return found["result"]

    def blocks(process: Process) -> list[Any]:
        number = int(ask(process, "eth_blockNumber"), 16)
        return [ask(process, "eth_getBlockByNumber", hex(each), False) for each in range(number + 1)]

    process = start()
    ask(process, "anvil_setBalance", account, "0x5")
    ask(process, "evm_mine")
    before = blocks(process)
    process.kill()
    for environment in (earlier, None):
        process = start(environment)
        assert blocks(process) == before, "other blocks than before"
        assert ask(process, "eth_getBalance", account, "latest") == "0x5", "another balance"
        ask(process, "evm_mine")
        before = blocks(process)
        times = [int(block["timestamp"], 16) for block in before]
        assert times == sorted(set(times)), f"times of blocks that do not rise: {times}"
        process.kill()
    return "blocks were added"


def _gateway(folder: Path, earlier: Mapping[str, str], _back: str) -> str:
    gateway = Gateway(folder)
    process, client = gateway.start()
    credential: dict[str, Any] = {"provider_type": "cloudflare", "cf_api_token": "abcdefghijkl", "cf_zone_id": "z"}
    client.rpc("admin", "CreateDnsCredential", name="c", set_as_default=True, **credential)
    add_domain(client, 0)
    client.rpc("admin", "RenewZtDomainCert", domain="0.example", force=True)
    client.debug_register("first")
    process.kill()
    before = gateway.stored()
    assert before.certificates, "no certificate is stored"
    for number, environment in enumerate((earlier, None), 1):
        process, client = gateway.start(environment)
        addresses = {each["instance_id"]: each["ip"] for each in client.rpc("admin", "Status")["hosts"]}
        assert addresses == {name: each.ip for name, each in before.instances.items()}, "other instances than before"
        assert client.rpc("admin", "GetZtDomain", domain="0.example")["cert_status"]["has_cert"], "no certificate"
        assert client.debug_register("first")["wg"]["client_ip"] == addresses["first"], "another address"
        client.debug_register(f"at the time {number}")
        add_domain(client, number)
        client.rpc("admin", "RenewZtDomainCert", domain=f"{number}.example", force=True)
        process.kill()
        now = gateway.stored()
        assert now.certificates["0.example"] == before.certificates["0.example"], "another certificate"
        assert now.instances.keys() > before.instances.keys(), "instances are gone"
        assert len({each.ip for each in now.instances.values()}) == len(now.instances), "an address was given twice"
        before = now
    return "instances and domains were added"


def _vmm(folder: Path, earlier: Mapping[str, str], _back: str) -> str:
    (folder / "vmm.toml").write_text(f'run_path = "{folder}/vms"\n[cvm.auto_restart]\nenabled = false\n')

    def start(environment: Mapping[str, str]) -> tuple[Process, VmmClient]:
        options = ("-c", f"{folder}/vmm.toml", "--listen", "127.0.0.1:0")
        variables = {"XDG_RUNTIME_DIR": str(folder), **environment}
        process = Process("vmm", *options, log=folder / "log", environment=variables)
        return process, VmmClient(process.description["url"])

    def machines(client: VmmClient) -> dict[str, Any]:
        return {vm["id"]: vm["configuration"] for vm in client.rpc("Status")["vms"]}

    process, client = start({})
    kept = client.deploy(name="kept", stopped=True)
    before = machines(client)
    process.kill()
    for number, environment in enumerate((earlier, {})):
        process, client = start(environment)
        assert machines(client) == before, "other machines than before"
        client.rpc("UpdateVm", id=kept, disk_size=30 + number)
        client.rpc("CreateVm", **configuration(name=f"made {number}", stopped=True))
        before = machines(client)
        process.kill()
    return "machines were changed and added"


def _stack(folder: Path, earlier: Mapping[str, str], back: str) -> str:
    def start(environment: Mapping[str, str] | None = None) -> Process:
        options = ("--free-ports", "--gateway", "--state", f"{folder}/state", "--journal", f"{folder}/journal")
        return Process("up", *options, log=folder / "log", environment=environment)

    def control(process: Process, method: str, path: str, body: Any = None) -> Any:
        return request(method, process.description["services"]["control"] + path, body)

    def tried(process: Process, method: str, path: str, body: Any) -> str:
        """Make a call; return why it was refused."""
        try:
            control(process, method, path, body)
        except urllib.error.HTTPError as error:
            return error.read().decode()
        return ""

    def judge(process: Process, *call: Any, is_valid: bool) -> None:
        refusal = tried(process, *call)
        assert bool(refusal) != is_valid, f"{call[1]} {'was refused' if refusal else 'succeeded'}: {refusal}"
        assert is_valid or EARLY.search(refusal), f"a refusal that does not name the time: {refusal}"

    boot: tuple[str, str, Any] = ("POST", "/guests/app/boot", {})
    process = start()
    names = {"first"}
    control(process, "POST", "/guests", {"name": "first"})
    policy = {**control(process, "GET", "/policies/src"), "gatewayAppId": "0x" + "12" * 20}
    control(process, "PUT", "/policies/src", policy)
    saved, saved_policy = control(process, "GET", "/state"), policy
    process.kill()
    for number, environment in enumerate((earlier, None), 1):
        is_valid = environment is None or back in VALID
        process = start(environment)
        health = control(process, "GET", "/stack/health")
        assert health.get("healthy", True), f"not healthy: {health}"
        assert control(process, "GET", "/policies/src") == policy, "another policy than before"
        assert names <= set(control(process, "GET", "/guests")), "a trust domain is gone"
        judge(process, *boot, is_valid=is_valid)
        log = (folder / "log").read_text()
        assert "Traceback" not in log, f"a traceback in the log: {log[-3000:]}"
        assert is_valid or EARLY.search(log), f"the start does not name the clock: {log[-1000:]}"
        allowed, path = policy["kms"], Path(process.description["policies"]["src"])
        path.write_text(path.read_text().replace('"mrAggregated"', '"mrAggregatedOfNobody"'))
        assert tried(process, *boot), "a boot succeeded though the file of the policy denies it"
        control(process, "PUT", "/policies/src", policy)
        assert control(process, "GET", "/policies/src")["kms"] == allowed, "another policy than was put"
        judge(process, *boot, is_valid=is_valid)
        judge(process, "PUT", "/state", saved, is_valid=is_valid)
        restored = saved_policy if is_valid else policy
        assert control(process, "GET", "/policies/src") == restored, "another policy than was restored or was there"
        judge(process, *boot, is_valid=is_valid)
        policy = {**control(process, "GET", "/policies/src"), "gatewayAppId": f"0x{number:040x}"}
        control(process, "PUT", "/policies/src", policy)
        process.kill()
    records = [json.loads(line) for line in (folder / "journal").read_text().splitlines()]
    times = [record["time"] for record in records if "time" in record]  # a state that is restored is a record, too
    assert times != sorted(times), "the journal has no record of the earlier time"
    return "it works" if back in VALID else "boots were refused at the earlier time"


SERVERS: Final[Mapping[str, Callable[[Path, Mapping[str, str], str], str]]] = {
    "chain": _chain,
    "gateway": _gateway,
    "vmm": _vmm,
    "stack": _stack,
}
