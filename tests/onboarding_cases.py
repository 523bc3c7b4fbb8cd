"""Random onboardings, and two KMS that carry them out: their guest agents are this file's, and show any evidence."""

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.serialization import Encoding

from dstack_emu.attest.release import release
from dstack_emu.kms_emu.config import KmsConfig
from dstack_emu.kms_emu.server import KmsServer
from dstack_emu.simulator.seed import Seed
from dstack_emu.transport.listen import bind_tcp
from tests.decision_cases import HOSTS, Draw, Forger
from tests.decision_model import BootInfo, Case, Evidence, Platform, Rpc, Vendor, Webhook
from tests.live_pccs import LivePccs, live_pccs
from tests.onboarding_model import Onboarding, own_boot_info
from tests.webhook_switch import WebhookSwitch, webhook_switch

TOKEN: Final = "the-sources-token"
ROOT_KEYS: Final = ("root-ca.key", "root-k256.key", "tmp-ca.key")
NOBODY: Final = BootInfo("", "", "", "", "", "", ("UpToDate",), ())
GET_KMS_KEY: Final[Rpc] = "GetKmsKey"


class OnboardingDraw(Draw):
    """One random onboarding: everything right at first, then none to three things changed on either side."""

    def __init__(self, forger: Forger, seed: str) -> None:
        super().__init__(forger, {True: NOBODY, False: NOBODY}, "", seed)

    def onboarding(self) -> Onboarding:
        """Draw it."""
        pick = self._random
        is_new = pick.random() < 0.6
        sides = [self.side(host, is_new=is_new) for host in HOSTS]
        right = [own_boot_info(side.evidence, side.vendor) for side in sides]
        seldom = pick.choice(("", "", "", "", "", "", "", "image of the source", "image of the receiver"))
        if seldom == "image of the source":  # it names none
            sides[0] = replace(sides[0], evidence=replace(sides[0].evidence, config="{}"))
        elif seldom:  # it is another one, and the webhook denies the receiver, too
            config = json.dumps(next(b.config for b in self._forger.booted if b.image != sides[1].evidence.image))
            evidence = replace(sides[1].evidence, config=config)
            sides[1] = replace(sides[1], evidence=evidence, vm_config=config)
        for _ in range(0 if seldom else pick.choice((0, 0, 0, 1, 1, 2, 3))):
            at = pick.randrange(2)
            sides[at] = pick.choices(*zip(*self._changes_of_side(), strict=True))[0](sides[at])
        source, receiver = sides
        vendor = pick.choice((source.vendor, receiver.vendor))
        self._own = right[0]
        webhook = self._webhook(receiver, right[1])
        if seldom == "image of the receiver":
            webhook = Webhook("mock", f"allowlist-mr:{right[0].mr_aggregated}")
        handover = replace(
            receiver,
            vendor=vendor,
            webhook=webhook,
            own=right[0],
            verifies_images=pick.random() < 0.6,
            vm_config=self._said(receiver),
        )
        self._own = right[1]
        listener: Any = pick.choice(("main", "main", "admin"))
        return Onboarding(
            handover=handover,
            source=source.evidence,
            source_form=pick.choices(("versioned", "legacy", "none"), (6, 3, 1))[0],
            source_enforces_self=seldom != "image of the source" and pick.random() < 0.8,
            source_is_public=not is_new or pick.random() < 0.7,
            release=pick.choice(("0.5", "0.6", "0.6")),
            webhook=self._webhook(source, right[0]),
            listener=listener,
            token=pick.choices(("", "right", "wrong"), (1, 6, 1) if listener == "admin" else (6, 1, 1))[0],
        )

    def side(self, host: str = HOSTS[0], *, is_new: bool = True) -> Case:
        """Draw a KMS as the source's caller that it would be."""
        evidence = replace(
            self._evidence(is_kms=True),
            platform=Platform(self._forger.devices[host]),
            form=self._random.choice(("scale", "scale", "msgpack")),
        )
        return Case(
            release="0.6" if is_new else "0.5",
            rpc=GET_KMS_KEY,
            webhook=Webhook("readme", ""),
            evidence=evidence,
            vendor=Vendor(),
            own=NOBODY,
            verifies_images=False,
            api_version=0,
            vm_config=evidence.config,
        )

    def _said(self, receiver: Case) -> str:
        """Return the vm_config of the receiver's Info, which may be another one than that of its evidence."""
        same = self._random.random() < 0.9 and receiver.vm_config
        return receiver.evidence.config if same else receiver.vm_config

    def _webhook(self, case: Case, right: BootInfo) -> Webhook:
        """Draw a webhook; two of them rarely allow everything that is right, so one of three allows everything."""
        return Webhook("mock", "allow-all") if self._random.random() < 0.35 else super()._webhook(case, right)

    def _changes_of_side(self) -> list[Any]:
        return [
            (self._change_platform, 5),
            (self._change_vendor, 2),
            (self._change_quote, 4),
            (self._change_log, 5),
            (self._change_config, 4),
        ]


class Agent:
    """A guest agent that quotes any evidence, and says any vm_config."""

    def __init__(self, forger: Forger) -> None:
        self.evidence: Evidence | None = None
        self.vm_config, self.url = "", ""
        self._forger = forger

    def answer(self, method: str, arguments: dict[str, Any] | None) -> dict[str, str]:
        """Answer Attest or Info."""
        if method == "/Info":
            return {"vm_config": self.vm_config}
        assert self.evidence is not None
        assert arguments is not None
        report_data = bytes.fromhex(arguments["report_data"])
        shown = self.evidence
        if not any(report_data):  # no key is bound by what a KMS asks about itself
            shown = replace(shown, bound_to="own", claims_own_key=True)
        return {"attestation": self._forger.attestation(shown, report_data).encode().hex()}


@contextmanager
def served(agent: Agent) -> Iterator[Agent]:
    """Serve an agent until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            answer = json.dumps(agent.answer(self.path.partition("?")[0], json.loads(body or b"null"))).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        agent.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield agent
        server.shutdown()
        thread.join()


Ask = Callable[[KmsServer, dict[str, Any]], str]
"""Calls Onboard of a receiver, and returns its refusal, empty if it succeeds."""


def by_prpc(receiver: KmsServer, request: dict[str, Any]) -> str:
    """Call Onboard in JSON over HTTP."""
    connection = HTTPConnection(receiver.url.partition("://")[2], timeout=20)
    connection.request("POST", "/prpc/Onboard.Onboard?json", json.dumps(request))
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return "" if response.status == 200 else str(answer["error"])


class Pair:
    """A source, which starts anew for each onboarding, and a receiver of each release, which stays fresh."""

    def __init__(
        self,
        folder: Path,
        pccs: LivePccs,
        switches: tuple[WebhookSwitch, WebhookSwitch],
        agents: tuple[Agent, Agent],
        forger: Forger,
        *,
        grpc: bool = False,
    ) -> None:
        self._grpc = grpc
        self.forger, self._folder, self._pccs, self._forged = forger, folder, pccs, agents
        self._switches = switches
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        (folder / "root.pem").write_bytes(pccs.intel.root.public_bytes(Encoding.PEM))
        self._thread.start()
        self.receivers: dict[str, KmsServer] = {}

    def run(self, work: Any) -> Any:
        """Run a coroutine where the KMS run."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def prepare(self, case: Case) -> None:
        """Let a source make its keys, and start the receivers; both are allowed to do so."""
        everything = Webhook("mock", "allow-all")
        self._show(case.evidence, case, everything, everything)
        source = self.run(self._start("source", 0, "0.6", {"onboard": {"auto_bootstrap_domain": "kms.test"}}))
        self.run(source.stop())
        for name in ("0.5", "0.6"):
            self.receivers[name] = self.run(self._start(f"receiver-{name}", 1, name, {}))

    def close(self) -> None:
        """Stop what runs."""
        for receiver in self.receivers.values():
            self.run(receiver.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def answers(self, case: Onboarding, ask: Ask = by_prpc) -> tuple[bool, str]:
        """Carry an onboarding out: whether the receiver got the keys, and its refusal if not."""
        call = case.handover
        self._show(case.source, call, call.webhook, case.webhook)
        settings: dict[str, Any] = {
            "enforce_self_authorization": case.source_enforces_self,
            "attest_rpc_cert": case.source_form != "none",
            "image": {"verify": call.verifies_images},
            "onboard": {"public_key_handover": case.source_is_public},
            "admin": {"enabled": True, "port": 0, "auth_token": TOKEN, "tls": self._tls("source")},
        }
        form = "legacy" if case.source_form == "legacy" else "versioned"
        source = self.run(self._start("source", 0, call.release, settings, form))
        try:
            url = source.admin_url if case.listener == "admin" else source.url
            token = {"": "", "right": TOKEN, "wrong": f"{TOKEN}s"}[case.token]
            request = {"source_url": url, "domain": "kms.test", "source_token": token}
            return self._onboard(case.release, request, ask)
        finally:
            self.run(source.stop())

    def asked(self) -> int:
        """How often a webhook was asked about a KMS."""
        return sum(switch.asked.count("/bootAuth/kms") for switch in self._switches)

    def _show(self, source: Evidence, call: Case, of_source: Webhook, of_receiver: Webhook) -> None:
        for switch, webhook in zip(self._switches, (of_source, of_receiver), strict=True):
            switch.set(webhook)
        self.forger.publish(call.vendor, source.platform, call.evidence.platform)
        for agent, evidence in zip(self._forged, (source, call.evidence), strict=True):
            agent.evidence, agent.vm_config = evidence, call.vm_config

    def _onboard(self, name: str, request: dict[str, Any], ask: Ask) -> tuple[bool, str]:
        refusal = ask(self.receivers[name], request)
        got, made = self._folder / f"receiver-{name}", self._folder / "source"
        if refusal:
            assert not list(got.iterdir()), "something is stored after a refusal"
            return False, refusal
        for key in ROOT_KEYS:
            assert (got / key).read_bytes() == (made / key).read_bytes()
        for path in got.iterdir():  # Onboard looks at the folder at every call: the receiver is fresh again
            path.unlink()
        return True, ""

    def _tls(self, name: str) -> dict[str, str]:
        return {"key": str(self._folder / name / "rpc.key"), "certs": str(self._folder / name / "rpc.crt")}

    async def _start(
        self, name: str, side: int, release_name: str, core: dict[str, Any], form: str = "versioned"
    ) -> KmsServer:
        certs, sock = self._folder / name, bind_tcp("127.0.0.1", 0)
        grpc = {"enabled": self._grpc and side == 1, "port": 0, "mtls_port": 0, "admin_port": 0}
        certs.mkdir(exist_ok=True)
        document = {
            "rpc": {"tls": {**self._tls(name), "mutual": {"ca_certs": str(certs / "tmp-ca.crt")}}},
            "core": {
                "cert_dir": str(certs),
                "attestation": {
                    "insecure_allow_external_trust_anchors": True,
                    "urls": {"pccs": self._pccs.url},
                    "root_ca": {"tdx": str(self._folder / "root.pem")},
                },
                "image": {"verify": False},
                "auth_api": {"webhook": {"url": self._switches[side].url}},
                **core,
            },
            "emulator": {"rpc_cert_evidence": form, "grpc": grpc},
        }
        server = KmsServer(
            KmsConfig.from_document(document, "kms.toml"),
            self._forged[side].url,
            entropy=os.urandom,
            clock=lambda: int(time.time()),
            sock=sock,
            release=release(release_name),
        )
        await server.start()
        return server


@contextmanager
def pair(folder: Path, seed: str, *, grpc: bool = False) -> Iterator[Pair]:
    """Serve two KMS with everything around them until the block ends; with `grpc` receivers serve it, too."""
    for name in ("of-source", "of-receiver"):
        (folder / name).mkdir()
    with ExitStack() as stack:
        pccs = stack.enter_context(live_pccs(seed))
        switches = tuple(stack.enter_context(webhook_switch(folder / name)) for name in ("of-source", "of-receiver"))
        forger = Forger(pccs.intel, Seed.of(seed).derive)
        agents = tuple(stack.enter_context(served(Agent(forger))) for _ in range(2))
        made = Pair(folder, pccs, (switches[0], switches[1]), (agents[0], agents[1]), forger, grpc=grpc)
        try:
            made.prepare(OnboardingDraw(forger, "preparation").side())
            yield made
        finally:
            made.close()
