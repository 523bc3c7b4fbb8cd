"""One gateway without its sockets: its records, and what acts on them. The ingress and the RPCs share it.

Whoever runs it tells where instances listen (`routing.Reach`), what time it is, and which CA signs its certificates.
"""

import base64
import uuid
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from dstack_emu.attest.issuing import CertificateAuthority
from dstack_emu.attest.proto import gateway_pb2 as pb
from dstack_emu.attest.release import Release
from dstack_emu.gateway.agent import GuestAgent
from dstack_emu.gateway.certbot import Certbot, CertbotContext
from dstack_emu.gateway.certificates import LoadedCertificates
from dstack_emu.gateway.config import GatewayConfig
from dstack_emu.gateway.connections import Connections
from dstack_emu.gateway.domains import best_domain
from dstack_emu.gateway.errors import GatewayError
from dstack_emu.gateway.health import HealthPoller, HealthStates
from dstack_emu.gateway.policies import PolicyFetcher
from dstack_emu.gateway.registry import Registry
from dstack_emu.gateway.routing import Instance, Reach
from dstack_emu.gateway.state import CertificateEntry, GatewayState, NodeEntry, PolicyEntry, Records
from dstack_emu.gateway.store import Store
from dstack_emu.transport.events import EventLog

Entropy = Callable[[int], bytes]
_WG_KEY: Final = 32


@dataclass(frozen=True, slots=True)
class GatewayContext:
    """What a gateway is given.

    `clock` is in Unix seconds. `authority` signs wildcard certificates, and `static` are certificates by domain that
    are served beside those. `connections` are counted by the ingress. `app_id` is its own, None if it
    does not identify itself.
    """

    config: GatewayConfig
    release: Release
    agent: GuestAgent
    reach: Reach
    clock: Callable[[], int]
    entropy: Entropy
    authority: CertificateAuthority
    static: Mapping[str, CertificateEntry]
    app_id: bytes | None
    connections: Connections = field(default_factory=Connections)


class Gateway:
    """The state of one gateway, and its parts. Open it, and close it. It implements `routing.Routes`."""

    def __init__(self, context: GatewayContext) -> None:
        self.context, self.config, self.release = context, context.config, context.release
        self.log = EventLog("dstack_emu.gateway")
        self._store = Store(context.config.core.sync.data_dir)
        self.records = Records(self._with_node(self._store.load()))
        self._stored = self.records.capture()
        core = context.config.core
        self.writes = self.publications = self.last_seen = 0
        self.published: dict[str, int] = {}
        self.connections = context.connections
        self.certificates = LoadedCertificates(context.static, context.clock, self.log)
        self.health = HealthStates()
        self.registry = Registry(
            self.records,
            core,
            self.release,
            clock=context.clock,
            entropy=context.entropy,
            health=self.health,
            changed=self.save,
        )
        self.poller = HealthPoller(self.registry.asked_for_health, self.health, core.proxy, context.reach, self.log)
        self.policies = PolicyFetcher(self.registry, core.proxy, context.reach, self.log)
        self.certbot = Certbot(
            CertbotContext(
                records=self.records,
                loaded=self.certificates,
                release=self.release,
                agent=context.agent,
                authority=context.authority,
                clock=context.clock,
                entropy=context.entropy,
                node_id=self.node_id,
                changed=self.save,
                log=self.log,
            )
        )
        self.certificates.load_all(self.records.certificates)
        self.save()

    def _with_node(self, state: GatewayState) -> GatewayState:
        """Return a state in which this node is known, up, and a peer of itself, as after each start of upstream's."""
        core, entropy = self.config.core, self.context.entropy
        node = state.node
        if node is None:
            private = X25519PrivateKey.from_private_bytes(entropy(_WG_KEY))
            key = base64.b64encode(private.public_key().public_bytes_raw()).decode()
            node = NodeEntry(uuid=uuid.UUID(bytes=entropy(16), version=4).hex, wg_public_key=key)
        node_id = core.sync.node_id
        return state.model_copy(
            update={
                "node": node,
                "node_statuses": {**state.node_statuses, node_id: "up"},
                "peer_urls": {**state.peer_urls, node_id: core.sync.my_url},
            }
        )

    def save(self) -> None:
        """Store everything; raise `GatewayError` if that fails, and put back what is stored."""
        state = self.records.capture()
        try:
            self._store.save(state)
        except BaseException:
            self.records.put(self._stored)
            raise
        self._stored = state
        self.writes += 1

    def change(self, table: str, key: str | int, entry: object | None) -> None:
        """Store an entry of one of the tables of the records, or remove it; raise `GatewayError` without a trace."""
        before: dict[str | int, object] = getattr(self.records, table)
        after = {**before, key: entry}
        self.set(table, after if entry is not None else {name: each for name, each in before.items() if name != key})

    def set(self, name: str, value: object) -> None:
        """Store one attribute of the records; raise `GatewayError` without a trace."""
        setattr(self.records, name, value)
        self.save()

    def publish(self) -> None:
        """Publish when each instance was heard of, and that this node runs, as for other nodes."""
        self.published = {
            id_: each.handshake_at for id_, each in self.records.instances.items() if each.handshake_at is not None
        }
        self.last_seen = self.context.clock()
        self.publications += len(self.published) + 1

    def start(self) -> None:
        """Begin what runs in the background: certificates, and the policies that are not known."""
        self.certbot.start()
        if self.release.gateway_rotates_instances:
            self.poller.start()
        for instance_id, entry in self.records.instances.items():
            if entry.effective is None:
                self.policies.begin(instance_id)

    def recycle(self) -> None:
        """Remove the instances that were not heard of for `core.recycle.timeout`."""
        self.publish()
        try:
            recycled = self.registry.recycle()
        except GatewayError as error:
            self.log.error("not recycled", reason=error)
            return
        if recycled:
            self.log.info("recycled", instances=", ".join(recycled))

    async def close(self) -> None:
        """End what runs in the background."""
        await self.poller.close()
        await self.policies.close()
        await self.certbot.close()

    # ---- snapshots

    def capture(self) -> GatewayState:
        """Return everything as data."""
        return self.records.capture()

    def restore(self, state: GatewayState) -> None:
        """Make everything what it was, and begin anew what runs in the background.

        Raises `GatewayError` if it cannot be stored.
        """
        self.records.put(state)
        self.save()
        self.certificates.load_all(self.records.certificates)
        self.published, self.last_seen = {}, 0
        self.health.forget_all()
        self.certbot.abandon()
        self.policies.abandon()
        self.start()

    # ---- what the ingress asks

    def candidates(self, name: str) -> Sequence[Instance]:
        """Return the instance of an instance id, or those of an app id, the freshest handshake first."""
        return self.registry.candidates(name)

    async def port_policy(self, instance: Instance) -> PolicyEntry | None:
        """Return the policy in force; if it is not known, begin to ask the instance, and return None."""
        entry = self.records.instances.get(instance.id)
        if entry is None:
            return None
        if entry.effective is None:
            self.policies.begin(instance.id)
            return None
        return entry.effective

    # ---- what several RPCs answer

    @property
    def node_id(self) -> int:
        """Return the number of this node."""
        return self.config.core.sync.node_id

    def node_info(self) -> pb.GatewayNodeInfo:
        """Describe this node, the only one."""
        node, wg = self.records.node, self.config.core.wg
        if node is None:
            raise RuntimeError("the gateway is not open")
        return pb.GatewayNodeInfo(
            id=self.node_id,
            uuid=bytes.fromhex(node.uuid),
            url=self.config.core.sync.my_url,
            last_seen=self.last_seen,
            wg_public_key=wg.public_key or node.wg_public_key,
            wg_ip=str(wg.ip),
            wg_endpoint=wg.endpoint,
        )

    @property
    def is_down(self) -> bool:
        """Return whether an operator has marked this node as down."""
        return self.records.node_statuses.get(self.node_id) == "down"

    def base_domain(self) -> tuple[str, int]:
        """Return the best domain and its port; an empty one and 0 if there is none."""
        return best_domain(self.records.domains, self.node_id)

    def info(self) -> pb.InfoResponse:
        """Describe this gateway to clients."""
        domain, port = self.base_domain()
        return pb.InfoResponse(
            base_domain=domain,
            external_port=port,
            app_address_ns_prefix=self.config.core.proxy.app_address_ns_prefix,
            version=self.release.version,
        )

    def acme_info(self) -> pb.AcmeInfoResponse:
        """Show the ACME account and the keys of the configured domains, with their quotes."""
        account = self.records.account
        keys = [each for domain in self.records.domains for each in self.records.attestations.get(domain, ())]
        return pb.AcmeInfoResponse(
            account_uri=account.uri if account is not None else "",
            account_quote=account.quote if account is not None else "",
            account_attestation=account.attestation if account is not None else "",
            quoted_hist_keys=[
                pb.QuotedPublicKey(
                    public_key=bytes.fromhex(each.public_key), quote=each.quote, attestation=each.attestation
                )
                for each in keys
            ],
        )

    def persistent_keys(self) -> int:
        """Return how many entries WaveKV's persistent store would have."""
        records = self.records
        quoted = sum(len(each) + 1 for each in records.attestations.values())
        singles = (records.default_credential, records.account)
        tables: tuple[Sized, ...] = (
            records.instances,
            records.node_statuses,
            records.peer_urls,
            records.credentials,
            records.domains,
            records.certificates,
        )
        return sum(map(len, tables)) + quoted + sum(each is not None for each in singles) + 1

    def ephemeral_keys(self) -> int:
        """Return how many entries WaveKV's ephemeral store would have: handshakes, and when this node was seen."""
        return len(self.published) + (self.last_seen > 0)
