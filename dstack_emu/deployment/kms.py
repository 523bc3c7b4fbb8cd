"""KMS of a stack, each in a trust domain of its own: the two it begins with, and those that are made while it runs."""

import shutil
import socket
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import Field

from dstack_emu.attest.certificate import EvidenceForm
from dstack_emu.deployment import policy_files
from dstack_emu.deployment.config import IMAGE_URL, StackError
from dstack_emu.deployment.guest import local_key_provider
from dstack_emu.deployment.guests import GuestSpec, Name, RunningGuest, _Spec, start_guest
from dstack_emu.kms_emu.config import KmsConfig
from dstack_emu.kms_emu.errors import KmsError
from dstack_emu.kms_emu.server import KmsServer
from dstack_emu.simulator.app_keys import OwnKeys
from dstack_emu.simulator.errors import GuestError
from dstack_emu.transport.errors import ConfigError
from dstack_emu.transport.listen import bind_tcp, reachable, serve

if TYPE_CHECKING:
    from dstack_emu.deployment.stack import Stack


BEGUN_WITH: Final = ("src", "dst")
"""The KMS that a stack begins with, whose files are its state folder's to keep; others begin without any."""


class KmsSpec(_Spec):
    """A KMS: its name (`third` is the service `kms-third` in the trust domain `kms-third`), and who decides for it.

    `webhook` is `own` (a new auth-simple with a policy of its own, that denies everyone), the name of another KMS whose
    webhook it shares, or the URL of somebody's. Fields of the trust domain are those of `GuestSpec`; `settings` are
    keys of kms.toml's [core], `rpc_cert_evidence` is the key of its [emulator]: with `legacy` it is a source of 0.5.x.
    """

    name: Annotated[Name, Field(max_length=20)]
    webhook: Annotated[str, Field(min_length=1, max_length=2000)] = "own"
    platform: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    image: str | None = None
    image_version: str = "0.5.11"
    compose: str | None = None
    rpc_cert_evidence: EvidenceForm = "versioned"
    settings: dict[str, Any] = Field(default_factory=dict)

    @property
    def guest(self) -> GuestSpec:
        """The trust domain it runs in."""
        return GuestSpec(
            name=f"kms-{self.name}",
            platform=self.platform,
            image=self.image,
            image_version=self.image_version,
            compose=self.compose,
        )


class RunningKms:
    """A KMS that answers, with what belongs to it alone."""

    def __init__(self, spec: KmsSpec, guest: RunningGuest) -> None:
        self.spec, self.guest = spec, guest
        self.exit = AsyncExitStack()

    @property
    def certs(self) -> Path:
        """Where it keeps its keys."""
        return self.guest.folder / "certs"

    async def close(self) -> None:
        """Stop it, and a webhook of its own."""
        await self.exit.aclose()


async def start_kms(stack: "Stack", spec: KmsSpec) -> RunningKms:
    """Start a KMS in a trust domain with keys of a local key provider, as production KMS have them."""
    side, name = spec.name, f"kms-{spec.name}"
    if side in stack.kms:
        raise StackError(f"there is a KMS {side} already")
    if side not in BEGUN_WITH:
        _forget_files(stack, spec)
    seed = stack.seed.child(f"kms {side}")
    try:
        guest = await start_guest(stack, spec.guest, f"agent-{side}", seed)
    except GuestError as error:
        raise StackError(str(error)) from error
    kms = RunningKms(spec, guest)
    try:
        provider = local_key_provider(stack.seed, name)
        guest.domain.complete(provider)
        own = OwnKeys.from_seed(guest.domain, seed.derive("sealing key", 32), provider, stack.world.clock.issue)
        await guest.agent.provide(own.keys, own.issuer)
        guest.streams["kms"] = seed.stream("kms")
        await _serve_kms(stack, kms)
    except BaseException:
        await remove_kms(stack, kms)
        raise
    stack.kms_parts[side] = kms
    if name not in stack.services:
        raise StackError(f"{name} does not answer")
    return kms


async def _serve_kms(stack: "Stack", kms: RunningKms) -> None:
    side, name = kms.spec.name, f"kms-{kms.spec.name}"
    webhook, is_own = await _webhook(stack, kms)
    sock = stack.take_socket(name) or bind_tcp(stack.config.host, 0)
    kms.exit.callback(sock.close)
    host, port = sock.getsockname()[:2]
    certs = kms.certs
    document: dict[str, Any] = {
        "rpc": {
            "address": host,
            "port": port,
            "tls": {
                "key": str(certs / "rpc.key"),
                "certs": str(certs / "rpc.crt"),
                "mutual": {"ca_certs": str(certs / "tmp-ca.crt")},
            },
        },
        "core": {
            "cert_dir": str(certs),
            "site_name": f"dstack-emu {side}",
            "attestation": {
                "insecure_allow_external_trust_anchors": True,
                "urls": {"pccs": stack.services["pccs"]},
                "root_ca": {"tdx": str(stack.root_ca)},
            },
            "image": {"cache_dir": str(stack.state / "images"), "download_url": IMAGE_URL},
            "auth_api": {"type": "webhook", "webhook": {"url": webhook}},
            "onboard": {"address": host, "port": port},
        },
    }
    document["core"] |= kms.spec.settings
    grpc_socks = _grpc_sockets(stack, kms)
    document["emulator"] = {"rpc_cert_evidence": kms.spec.rpc_cert_evidence, "grpc": {"enabled": bool(grpc_socks)}}
    try:
        server = KmsServer(
            KmsConfig.from_document(document, name),
            f"unix:{kms.guest.folder / 'dstack.sock'}",
            entropy=kms.guest.streams["kms"],
            clock=stack.world.clock,
            issue_clock=stack.world.clock.issue,
            sock=sock,
            grpc_socks=grpc_socks,
            grpc_interceptors=stack.world.interceptors(name) if grpc_socks else (),
            auth=stack.world.webhook(name, webhook, own=is_own),
            instruments=stack.world.surroundings(name, stack.verifier_of(name)),
        )
        kms.exit.push_async_callback(server.stop)
        with stack.logs.of(name):
            await server.start()
    except (KmsError, ConfigError) as error:
        raise StackError(f"{name}: {error}") from error
    stack.kms[side] = server
    stack.note_url(side)


def _grpc_sockets(stack: "Stack", kms: RunningKms) -> dict[str, socket.socket]:
    """The bound ports of its gRPC listeners, by their keys in kms.toml; none where the stack serves no gRPC."""
    if not stack.config.grpc:
        return {}
    socks = {}
    for key, suffix in (("port", "grpc"), ("mtls_port", "grpc-mtls")):
        name = f"kms-{kms.spec.name}-{suffix}"
        socks[key] = stack.take_socket(name) or bind_tcp(stack.config.host, 0)
        kms.exit.callback(socks[key].close)
        stack.grpc[name] = reachable(socks[key])
        kms.exit.callback(stack.grpc.pop, name, None)
    return socks


async def _webhook(stack: "Stack", kms: RunningKms) -> tuple[str, bool]:
    """The URL of who decides for it, made where it is to have its own; and whether it is part of the stack."""
    wanted, side = kms.spec.webhook, kms.spec.name
    if wanted.startswith(("http://", "https://")):
        return wanted, wanted.rstrip("/") in stack.services.values()
    service = f"auth-{side if wanted == 'own' else wanted}"
    if wanted == "own" and service not in stack.services:
        path = stack.policies["src"].with_name(f"{service}.json")
        policy_files.write(path, policy_files.DENY_ALL)
        stack.policies[side] = path
        server = await serve(stack.auth_app(side), bind_tcp(stack.config.host, 0))
        kms.exit.push_async_callback(server.close)
        stack.services[service] = server.url
    if service not in stack.services:
        raise StackError(f"webhook: own, the name of a KMS, or a URL expected, got {wanted!r:.100}")
    return stack.services[service], True


def _forget_files(stack: "Stack", spec: KmsSpec) -> None:
    """Remove the keys of a KMS that is made while the stack runs, and a policy of its own."""
    shutil.rmtree(stack.state / f"kms-{spec.name}" / "certs", ignore_errors=True)
    if spec.webhook == "own":
        stack.policies["src"].with_name(f"auth-{spec.name}.json").unlink(missing_ok=True)


async def remove_kms(stack: "Stack", kms: RunningKms) -> None:
    """Stop a KMS that was made while the stack ran, and forget it."""
    side = kms.spec.name
    await kms.close()
    await kms.guest.close()
    for service in (f"kms-{side}", f"agent-{side}"):
        stack.services.pop(service, None)
    if kms.spec.webhook == "own":
        stack.services.pop(f"auth-{side}", None)
        stack.policies.pop(side, None)
    if side not in BEGUN_WITH:
        _forget_files(stack, kms.spec)
    stack.guests.pop(kms.guest.name, None)
    stack.kms.pop(side, None)
    stack.kms_parts.pop(side, None)
    stack.kms_info.pop(side, None)
    stack.world.verifiers.pop(f"kms-{side}", None)
