"""One trust domain with its agent and, unless another is named, its own PCCS, for `dstack-emu agent` and `boot`.

`dstack-emu agent` has generated keys or those of a file, as upstream's simulator; `dstack-emu boot` gets them from a
KMS that runs elsewhere. `deployment.deployment` has the whole authorization flow in one process.
"""

import asyncio
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dstack_emu.attest.app_info import vm_config_of
from dstack_emu.deployment.agent_listeners import AgentAddresses, AgentListeners, SocketFile
from dstack_emu.deployment.clock import ISSUED_AT
from dstack_emu.deployment.guest_config import GuestConfig, KmsBoot, local_key_provider, power_on
from dstack_emu.deployment.standalone import Standalone
from dstack_emu.simulator.agent import GuestAgent
from dstack_emu.simulator.app_keys import AppKeys, CertificateIssuer, LocalIssuer, OwnKeys
from dstack_emu.simulator.errors import GuestError
from dstack_emu.simulator.guest_files import (
    DECRYPTED_ENV,
    KeyFile,
    KmsAccess,
    decrypt_environment,
    write_environment,
)
from dstack_emu.simulator.intel import Intel
from dstack_emu.simulator.pccs import pccs_app
from dstack_emu.simulator.seed import Seed
from dstack_emu.simulator.trust_domain import KeyProvider
from dstack_emu.transport.background import begin_in_background
from dstack_emu.transport.listen import bind_tcp, serve
from dstack_emu.transport.urls import shown_url

RETRY_PAUSE: Final = 0.5
"""Seconds between two requests to a KMS that refuses keys."""

Keys = tuple[AppKeys, CertificateIssuer]

log = logging.getLogger("dstack_emu.stack")


@dataclass(frozen=True, slots=True)
class ListenOptions:
    """The listening options of the commands; a socket file that is None is in a temporary folder.

    `grpc` is host and port of a gRPC listener, `grpc_sock` a socket file; without both there is no gRPC.
    """

    host: str = "127.0.0.1"
    port: int = 0
    dstack_sock: Path | None = None
    tappd_sock: Path | None = None
    grpc: tuple[str, int] | None = None
    grpc_sock: Path | None = None


class StandaloneGuest(Standalone):
    """A single guest. Enter it to start it; leaving it stops every listener."""

    def __init__(
        self,
        config: GuestConfig,
        listen: ListenOptions | None = None,
        *,
        pccs_url: str | None = None,
        progress: Callable[[str], None] = log.info,
    ) -> None:
        super().__init__()
        self.config, self._listen, self._progress = config, listen or ListenOptions(), progress
        self._given_pccs_url = pccs_url
        self._seed = Seed.of(config.seed).child(f"guest {config.name}")
        self._kms_url = "" if config.kms is None else config.kms.urls[0].rstrip("/")

    # ---- starting

    async def _start(self) -> None:
        addresses = self._bind()
        self.intel = Intel(Seed.of(self.config.seed))
        self.root_ca = self._folder / "root-ca.pem"
        self.root_ca.write_text(self.intel.root_pem)
        self.pccs_url = self._given_pccs_url or await self._serve_pccs()
        self.domain = power_on(self.intel, self.config)
        self.agent = GuestAgent(self.domain, self._seed.stream("agent"), allow_emit_event=self.config.allow_emit_event)
        kms = self.config.kms
        if kms is not None:
            app_id, compose_hash = self.domain.app_id.hex(), self.domain.compose_hash.hex()
            self._progress(f"requesting keys for app id {app_id}, compose hash {compose_hash}")
        if kms is None or not kms.keeps_asking:
            await self._provide(await self._keys())
        self._listeners = await AgentListeners.open(self.agent, addresses)
        self._exit.push_async_callback(self._listeners.close)
        if kms is not None and kms.keeps_asking:
            requests = begin_in_background(self._request_until_provided(), "guest requests its keys")
            self._exit.push_async_callback(_cancelled, requests)

    def _bind(self) -> AgentAddresses:
        """Bind the TCP ports first, so that a port in use is an error before anything runs."""
        listen = self._listen
        tcp = bind_tcp(listen.host, listen.port, setting="--listen HOST:PORT")
        self._exit.callback(tcp.close)
        grpc = None
        if listen.grpc is not None:
            grpc = bind_tcp(*listen.grpc, setting="--grpc HOST:PORT")
            self._exit.callback(grpc.close)
        self._folder = Path(self._exit.enter_context(tempfile.TemporaryDirectory(prefix="dstack-emu-")))
        self.dstack_sock = listen.dstack_sock or self._folder / "dstack.sock"
        self.tappd_sock = listen.tappd_sock or self._folder / "tappd.sock"
        return AgentAddresses(
            tcp,
            SocketFile(self.dstack_sock, "--dstack-sock"),
            SocketFile(self.tappd_sock, "--tappd-sock"),
            grpc,
            None if listen.grpc_sock is None else SocketFile(listen.grpc_sock, "--grpc-sock"),
        )

    async def _serve_pccs(self) -> str:
        server = await serve(pccs_app(self.intel), bind_tcp(self._listen.host, 0))
        self._exit.push_async_callback(server.close)
        return server.url

    # ---- keys

    @property
    def _kms_ca(self) -> Path:
        return self._folder / "kms-ca.pem"

    async def _provide(self, given: Keys) -> None:
        keys, issuer = given
        environment = decrypt_environment(self.domain, self.config.encrypted_env, keys)
        if self._kms_url:
            self._kms_ca.write_text(keys.ca_cert)
        await self.agent.provide(keys, issuer)
        if self.config.encrypted_env:
            write_environment(self._folder, environment)

    async def _request_until_provided(self) -> None:
        given: Keys | None = None
        reported = ""
        while True:
            try:
                given = given or await self._keys()
                await self._provide(given)
            except GuestError as error:
                if str(error) != reported:
                    reported = str(error)
                    self._progress(f"no keys yet: {error}")
                await asyncio.sleep(RETRY_PAUSE)
            else:
                self._progress(f"keys from {shown_url(self._kms_url)}")
                return

    async def _keys(self) -> Keys:
        """Get the keys, and measure their provider; an issuer's connections are closed with the guest."""
        if self.config.kms is not None:
            return await self._keys_of_kms(self.config.kms)
        if self.config.key_file is not None:
            return await self._keys_of_file(self.config.key_file)
        return self._own_keys()

    async def _keys_of_kms(self, kms: KmsBoot) -> Keys:
        from dstack_emu.deployment.key_fetching import CollateralSource, fetch_keys_patiently  # needs verification

        collateral = CollateralSource(self.pccs_url, self.intel.root_der, self.config.seed)
        entropy = self._seed.stream("boot")  # from its beginning, so that every attempt has the same bytes
        keys, issuer = await fetch_keys_patiently(self.domain, kms, collateral, entropy, self._progress)
        self._exit.push_async_callback(issuer.close)
        self._kms_url = issuer.url.removesuffix("/prpc")
        return keys, issuer

    async def _keys_of_file(self, file: KeyFile) -> Keys:
        if not isinstance(file.issuer, KmsAccess):
            self.domain.complete(file.keys.provider)
            return file.keys, LocalIssuer(file.issuer, lambda: ISSUED_AT, self.config.release)
        self._kms_url = file.issuer.url.removesuffix("/prpc")
        # A KMS answers with the keys the hash that the guest claims.
        claimed = vm_config_of(self.domain.vm_config_json).os_image_hash
        self.domain.complete(file.keys.provider, os_image_hash=claimed)
        from dstack_emu.simulator.guest_boot import kms_issuer  # needs verification

        entropy = self._seed.stream("boot")
        issuer = await kms_issuer(self.domain, file.issuer, file.keys.ca_cert, entropy, ISSUED_AT)
        self._exit.push_async_callback(issuer.close)
        return file.keys, issuer

    def _own_keys(self) -> Keys:
        local = self.config.key_provider == "local-sgx"
        name = self.config.manifest.name
        provider = local_key_provider(Seed.of(self.config.seed), name) if local else KeyProvider("none")
        self.domain.complete(provider)
        own = OwnKeys.from_seed(self.domain, self._seed.derive("sealing key", 32), provider, lambda: ISSUED_AT)
        return own.keys, own.issuer

    # ---- what there is

    @property
    def url(self) -> str:
        """The URL of its TCP port."""
        return self._listeners.url

    def description(self) -> dict[str, Any]:
        """Everything a client needs to know, as `--json` prints it."""
        domain, info = self.domain, self.agent.app_info()
        return {
            "dstack_url": self.url,
            "tappd_url": self.url,
            "dstack_sock": str(self.dstack_sock),
            "tappd_sock": str(self.tappd_sock),
            **self._grpc_description(),
            "pccs_url": self.pccs_url,
            "root_ca": str(self.root_ca),
            "app_id": domain.app_id.hex(),
            "instance_id": domain.instance_id.hex(),
            "device_id": domain.platform.device_id.hex(),
            "mr_aggregated": info.mr_aggregated.hex(),
            "os_image_hash": info.os_image_hash.hex(),
            "compose_hash": domain.compose_hash.hex(),
            **self._kms_description(),
            **({"decrypted_env": str(self._folder / DECRYPTED_ENV)} if self.config.encrypted_env else {}),
            "env": {
                "DSTACK_SIMULATOR_ENDPOINT": str(self.dstack_sock),
                "TAPPD_SIMULATOR_ENDPOINT": str(self.tappd_sock),
            },
        }

    def _grpc_description(self) -> dict[str, str]:
        found = {"grpc_sock": self._listeners.grpc_sock, "grpc_target": self._listeners.grpc_target}
        return {name: value for name, value in found.items() if value}

    def _kms_description(self) -> dict[str, str]:
        if not self._kms_url:
            return {}
        description = {"kms_url": self._kms_url, "kms_ca": str(self._kms_ca)}
        if self.agent.has_keys:
            description["gateway_app_id"] = self.agent.keys.gateway_app_id
        return description


async def _cancelled(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
