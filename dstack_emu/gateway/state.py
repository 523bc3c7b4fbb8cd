"""What a gateway keeps, as data that can be stored, captured and restored. Times are Unix seconds, bytes are hex."""

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

PortNumber = Annotated[int, Field(ge=0, le=65535)]
NodeStatus = Literal["up", "down"]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class PolicyEntry(_Entry):
    """A port policy: ports, each with whether a PROXY v2 header goes first, and whether all others are closed."""

    ports: dict[PortNumber, bool] = {}
    restrict_mode: bool = False

    def is_open(self, port: int) -> bool:
        """Return whether a port may be reached."""
        return not self.restrict_mode or port in self.ports

    def sends_proxy_header(self, port: int) -> bool:
        """Return whether a PROXY v2 header goes first to a port."""
        return self.ports.get(port, False)


class InstanceEntry(_Entry):
    """An instance: its app, its address and WireGuard key, and when it was registered and last heard of.

    `compose_hash` is that of its reported policy; `override` is the policy that an operator set, and `ready` whether
    one left it in rotation. With `health_check` its app asks for no traffic while it is not healthy.
    """

    app_id: str
    ip: str
    public_key: str
    registered_at: int
    handshake_at: int | None = None
    compose_hash: str = ""
    reported: PolicyEntry | None = None
    override: PolicyEntry | None = None
    ready: bool = True
    health_check: bool = False

    @property
    def effective(self) -> PolicyEntry | None:
        """Return the policy in force; None is unknown."""
        return self.reported if self.override is None else self.override


class CredentialEntry(_Entry):
    """A DNS credential; times to live and to wait in seconds."""

    name: str
    api_token: str = Field(repr=False)
    api_url: str | None
    txt_ttl: int
    max_wait: int
    created_at: int
    updated_at: int


class DomainEntry(_Entry):
    """The configuration of a domain, whose name is the key of this entry."""

    credential: str | None
    port: PortNumber
    node: int | None
    priority: int


class CertificateEntry(_Entry):
    """A wildcard certificate (PEM chain) and its key (PKCS#8 PEM)."""

    chain: str
    key: str = Field(repr=False)
    not_after: int
    issued_by: int
    issued_at: int


class AttestationEntry(_Entry):
    """The quoted public key of a certificate (SPKI DER); quote and attestation are an agent's answers in JSON."""

    public_key: str
    quote: str
    attestation: str
    generated_by: int
    generated_at: int


class AccountEntry(_Entry):
    """The ACME account of a directory, and its quotes."""

    uri: str
    directory: str
    quote: str = ""
    attestation: str = ""


class CertbotEntry(_Entry):
    """When certificates are renewed (seconds), and the ACME directory; an empty one is Let's Encrypt's."""

    renew_interval: int = 43200
    renew_before_expiration: int = 2592000
    renew_timeout: int = 300
    acme_url: str = ""


class NodeEntry(_Entry):
    """This node: its uuid (hex) and its WireGuard key."""

    uuid: str
    wg_public_key: str


class GatewayState(_Entry):
    """All that a gateway keeps. Instances are by instance id, nodes by number, certificates by domain."""

    node: NodeEntry | None = None
    instances: dict[str, InstanceEntry] = {}
    node_statuses: dict[int, NodeStatus] = {}
    peer_urls: dict[int, str] = {}
    credentials: dict[str, CredentialEntry] = {}
    default_credential: str | None = None
    domains: dict[str, DomainEntry] = {}
    certificates: dict[str, CertificateEntry] = {}
    attestations: dict[str, tuple[AttestationEntry, ...]] = {}
    account: AccountEntry | None = None
    accounts_made: int = 0
    certbot: CertbotEntry = CertbotEntry()


FIELDS: Final[tuple[str, ...]] = tuple(GatewayState.model_fields)


class Records:
    """The state of one gateway while it runs: one attribute for each field of `GatewayState`.

    Whoever changes one calls `Gateway.save`, which stores all of it, or puts back what is stored. An instance may be
    replaced, but not changed.
    """

    node: NodeEntry | None
    instances: dict[str, InstanceEntry]
    node_statuses: dict[int, NodeStatus]
    peer_urls: dict[int, str]
    credentials: dict[str, CredentialEntry]
    default_credential: str | None
    domains: dict[str, DomainEntry]
    certificates: dict[str, CertificateEntry]
    attestations: dict[str, tuple[AttestationEntry, ...]]
    account: AccountEntry | None
    accounts_made: int
    certbot: CertbotEntry

    def __init__(self, state: GatewayState) -> None:
        self.put(state)

    def put(self, state: GatewayState) -> None:
        """Make everything what a state has."""
        for name in FIELDS:
            value: Any = getattr(state, name)
            setattr(self, name, dict(value) if isinstance(value, dict) else value)

    def capture(self) -> GatewayState:
        """Return everything as data."""
        values = {name: getattr(self, name) for name in FIELDS}
        copied = {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}
        return GatewayState().model_copy(update=copied)
