"""Servers that are killed with SIGKILL at a moment of a call: KMS, VMM, chain, gateway, a stack with its state folder.

At the next start a thing is whole or gone, what was answered is there, and the same call succeeds again.
"""

import itertools
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from campaigns import crash_clock, crash_gateway
from campaigns.case import Act, Finding, Outcome
from campaigns.crash_process import Process, cut_off, request
from tests.foreign import kms
from tests.running import RunningStack, running_stack
from tests.vmm import COMPOSE, VmmClient, configuration

SERVERS: Final[dict[str, tuple[str, ...]]] = {
    "kms": ("Bootstrap", "Onboard"),
    "vmm": ("create", "update", "remove"),
    "chain": ("mine", "set a balance"),
    "stack": ("policy", "trust domain", "nothing"),
    "gateway": crash_gateway.CALLS,
}
SPREAD: Final[Mapping[str, float]] = {"kms": 0.15, "vmm": 0.05, "chain": 0.02, "stack": 0.4}
"""Seconds within which the moments lie, from the beginning of a call, or of what a KMS stores in it."""
OTHER: Final = COMPOSE + "\n"


class Servers:
    """The servers, and the stack beside which a KMS runs; it starts when it is needed."""

    def __init__(self) -> None:
        self._exit, self._numbers = ExitStack(), itertools.count(1)
        self._stack: RunningStack | None = None

    def __enter__(self) -> "Servers":
        self._folder = Path(self._exit.enter_context(tempfile.TemporaryDirectory(prefix="crash-")))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    def run(self, act: Act, outcome: Outcome) -> None:
        """Kill a server once, or set its clock back, start it again, and judge."""
        server, folder = str(act.fields["server"]), self._folder / str(next(self._numbers))
        folder.mkdir()
        try:
            outcome.counts[f"{server}: {self._ended(act, server, folder)}"] += 1
        except AssertionError as error:
            outcome.findings.append(Finding(f"{server}: {str(error).partition(':')[0]:.80}", str(error)))
        finally:
            for process in tuple(Process.running):
                process.kill()

    def _ended(self, act: Act, server: str, folder: Path) -> str:
        if act.name == "set the clock back":
            return f"set back by {crash_clock.set_back(folder, server, str(act.fields['back']))}"
        run = {"kms": self._kms, "vmm": _vmm, "chain": _chain, "stack": _stack, "gateway": crash_gateway.killed}[server]
        return run(folder, str(act.fields["call"]), float(act.fields["moment"]))

    def _kms(self, folder: Path, method: str, moment: float) -> str:
        if self._stack is None:
            self._stack = self._exit.enter_context(running_stack())
        services = self._stack.services
        certs = folder / "certs"
        certs.mkdir()
        config = folder / "kms.toml"
        config.write_text(
            f"""
[rpc]
tls = {{ key = "{certs}/rpc.key", certs = "{certs}/rpc.crt", mutual = {{ ca_certs = "{certs}/tmp-ca.crt" }} }}
[core]
cert_dir = "{certs}"
image = {{ verify = false }}
auth_api = {{ webhook = {{ url = "{services["auth-dst"]}" }} }}
[core.attestation]
insecure_allow_external_trust_anchors = true
urls = {{ pccs = "{services["pccs"]}" }}
root_ca = {{ tdx = "{self._stack.description["root_ca"]}" }}
"""
        )
        arguments = {"domain": "127.0.0.1"}
        if method == "Onboard":
            arguments["source_url"] = services["kms-src"]

        def start() -> Process:
            agent = {"DSTACK_AGENT_ADDRESS": services["agent-dst"]}
            options = ("-c", str(config), "--listen", "127.0.0.1:0")
            return Process("kms", *options, log=folder / "log", environment=agent)

        def ask(url: str) -> Any:
            with kms(url) as connection:
                return connection.call(method, **arguments).value["k256_pubkey"]

        def wait() -> None:
            first = ("", ".writing", ".committed")[int(moment * 3)]
            began = time.monotonic()
            while first and not (certs / first).exists() and time.monotonic() - began < 10:
                if (certs / "rpc.crt").exists():  # too fast to be seen
                    break
            time.sleep(moment * 3 % 1 * (SPREAD["kms"] if first else 1.0))

        process = start()
        url = process.description["url"]
        answered = cut_off(process, lambda: ask(url), wait)
        again = start()
        try:
            assert not [path.name for path in certs.iterdir() if path.name.startswith(".")], (
                "something unfinished is left"
            )
            if again.description["phase"] == "onboard":
                assert answered is None, "keys that were answered are gone"
                assert not list(certs.iterdir()), f"some files are left: {sorted(certs.iterdir())}"
                assert ask(again.description["url"]), "the second call was refused"
                return f"{method}: no keys, and asked again"
            with kms(again.description["url"]) as connection:
                public = connection.call("GetMeta").value["k256_pubkey"]
            assert answered in (None, public), "other keys than those that were answered"
            return f"{method}: all keys, {'answered' if answered else 'cut off'}"
        finally:
            again.kill()


def _vmm(folder: Path, kind: str, moment: float) -> str:
    (folder / "vmm.toml").write_text(f'run_path = "{folder}/vms"\n[cvm.auto_restart]\nenabled = false\n')

    def start() -> tuple[Process, VmmClient]:
        options = ("-c", f"{folder}/vmm.toml", "--listen", "127.0.0.1:0")
        process = Process("vmm", *options, log=folder / "log", environment={"XDG_RUNTIME_DIR": str(folder)})
        return process, VmmClient(process.description["url"])

    def machines(client: VmmClient) -> dict[str, tuple[Any, ...]]:
        found = client.rpc("Status")["vms"]
        fields = ("name", "compose_file", "disk_size")
        listed = {vm["id"]: tuple(vm["configuration"][name] for name in fields) for vm in found}
        assert len(listed) == len(found), "a machine is there twice"
        return listed

    process, client = start()
    kept = client.deploy(name="kept", stopped=True)
    before = machines(client)
    method, body = {
        "create": ("CreateVm", configuration(name="new", stopped=True)),
        "update": ("UpdateVm", {"id": kept, "compose_file": OTHER, "disk_size": 30}),
        "remove": ("RemoveVm", {"id": kept}),
    }[kind]
    answered = cut_off(
        process, lambda: client.rpc(method, **body) or True, lambda: time.sleep(2 * moment * SPREAD["vmm"])
    )
    again, client = start()
    try:
        after = machines(client)
        new = {vm_id: what for vm_id, what in after.items() if vm_id not in before}
        if kind == "create":
            assert all(after.get(vm_id) == what for vm_id, what in before.items()), "another machine changed"
            assert [what[0] for what in new.values()] in ([], ["new"]), f"half a machine: {new}"
            is_done = bool(new)
        elif kind == "update":
            assert after in (before, {kept: ("kept", OTHER, 30)}), f"half a change: {after}"
            is_done = after != before
        else:
            assert after in (before, {}), f"half a machine: {after}"
            is_done = not after
        assert is_done or answered is None, "what was answered is gone"
        hidden = [path.name for path in (folder / "vms").rglob(".*")]
        assert not [name for name in hidden if name.startswith((".new", ".gone", ".change"))], f"left: {hidden}"
        if kind != "remove" or kept in after:
            client.rpc(method, **body)
        return f"{kind}: {'done' if is_done else 'not done'}, {'answered' if answered else 'cut off'}"
    finally:
        again.kill()


def _chain(folder: Path, call: str, moment: float) -> str:
    account = "0x" + "ab" * 20
    method, params = ("evm_mine", []) if call == "mine" else ("anvil_setBalance", [account, "0x5"])

    def start() -> Process:
        return Process("chain", "--listen", "127.0.0.1:0", "--state", str(folder / "chain"), log=folder / "log")

    def ask(process: Process, name: str, *arguments: Any) -> Any:
        found = request(
            "POST", process.description["url"], {"jsonrpc": "2.0", "id": 1, "method": name, "params": arguments}
        )
        assert "result" in found, f"{name} was refused: {found}"
        return found["result"]

    process = start()
    before = int(ask(process, "eth_blockNumber"), 16)
    answered = [0]

    def several() -> bool:
        for _ in range(50):
            ask(process, method, *params)
            answered[0] += 1
        return True

    cut_off(process, several, lambda: time.sleep(moment * SPREAD["chain"] * 10))
    again = start()
    try:
        if call == "mine":
            blocks = int(ask(again, "eth_blockNumber"), 16) - before
            assert answered[0] <= blocks <= answered[0] + 1, f"{blocks} blocks after {answered[0]} answers"
        else:
            balance = int(ask(again, "eth_getBalance", account, "latest"), 16)
            assert balance == 5 or not answered[0], f"a balance of {balance} after {answered[0]} answers"
        ask(again, "evm_mine")
        return f"{call}: {'some answered' if answered[0] else 'none answered'}"
    finally:
        again.kill()


def _stack(folder: Path, call: str, moment: float) -> str:
    def start() -> Process:
        return Process("up", "--free-ports", "--state", str(folder / "state"), log=folder / "log")

    def control(process: Process, method: str, path: str, body: Any = None) -> Any:
        return request(method, process.description["services"]["control"] + path, body)

    process = start()
    policy = {**control(process, "GET", "/policies/src"), "gatewayAppId": "0x" + "12" * 20}
    calls: dict[str, Callable[[], Any]] = {
        "policy": lambda: control(process, "PUT", "/policies/src", policy),
        "trust domain": lambda: control(process, "POST", "/guests", {"name": "extra"}),
        "nothing": lambda: control(process, "GET", "/stack"),
    }
    answered = cut_off(process, lambda: (calls[call](), True), lambda: time.sleep(moment * SPREAD["stack"]))
    again = start()
    try:
        health = control(again, "GET", "/stack/health")
        assert health.get("healthy", True), f"not healthy: {health}"
        if call == "policy":
            found = control(again, "GET", "/policies/src")["gatewayAppId"]
            assert found == policy["gatewayAppId"] or answered is None, "a policy that was answered is gone"
        elif call == "trust domain":
            names = set(control(again, "GET", "/guests"))
            assert "extra" in names or answered is None, f"a trust domain that was answered is gone: {names}"
        return f"{call}: {'answered' if answered else 'cut off'}"
    finally:
        again.kill()
