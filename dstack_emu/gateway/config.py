"""gateway.toml: what a gateway is configured with, with upstream's names and defaults.

Unknown keys are accepted, as upstream does; a value of another type is refused. Keys of WireGuard's interface, of
threads and of kernel features are read, and have no effect. Source: dstack `gateway/gateway.toml` and
`gateway/src/config.rs` at 312dc605, whose keys those of 40eaf35e are among; `health_check` is that of
docs/app-health-checks.md at 1f7c6cda.
"""

from ipaddress import IPv4Address, IPv4Interface, IPv4Network, ip_address
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from dstack_emu.attest.release import Release
from dstack_emu.gateway.errors import GatewayConfigError
from dstack_emu.transport.settings import Duration, FilePath, Port, read_toml, validate
from dstack_emu.transport.trust_root import AttestationConfig

MAX_PORTS: Final = 1024
"""The maximum number of ports in `core.proxy.listen_port`; upstream has no limit but that of open files."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, populate_by_name=True)


def _ports(value: Any) -> Any:
    """Read one port, or a text with one port or a range such as `443-543`."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    if not isinstance(value, str):
        return value
    first, dash, last = value.partition("-")
    try:
        start, end = int(first), int(last if dash else first)
    except ValueError as error:
        raise ValueError(f"a port, or a range such as 443-543, expected, got {value!r:.40}") from error
    if start > end:
        raise ValueError(f"invalid port range: {start} > {end}")
    if end - start >= MAX_PORTS:
        raise ValueError(f"at most {MAX_PORTS} ports expected, got {end - start + 1}")
    return tuple(range(start, end + 1))


def _socket_address(value: Any) -> Any:
    """Read an IP address with a port, such as `127.0.0.1:53` or `[::1]:53`."""
    if not isinstance(value, str):
        return value
    host, _, port = value.rpartition(":")
    is_ipv6 = host.startswith("[") and host.endswith("]")
    try:
        address = ip_address(host[1:-1] if is_ipv6 else host)
        number = int(port) if port.isascii() and port.isdecimal() else -1
    except ValueError:
        number = -1
    if not 0 <= number <= 0xFFFF or address.version != (6 if is_ipv6 else 4):
        raise ValueError(f"an IP address with a port expected, such as 127.0.0.1:53 or [::1]:53, got {value!r:.80}")
    return str(address), number


SocketAddress = Annotated[tuple[str, int], BeforeValidator(_socket_address)]
SocketAddresses = Annotated[tuple[SocketAddress, ...], Field(strict=False)]
Ports = Annotated[tuple[Port, ...], BeforeValidator(_ports)]
Address = Annotated[IPv4Address, Field(strict=False)]
Interface = Annotated[IPv4Interface, Field(strict=False)]
Network = Annotated[IPv4Network, BeforeValidator(lambda value: IPv4Interface(value).network), Field(strict=False)]


class Listener(_Section):
    """Where an HTTP listener is: `address` is `host:port`, or a host with the key `port`."""

    address: str
    port: Port | None = None

    def endpoint(self, key: str) -> tuple[str, int]:
        """Return host and port; raise `GatewayConfigError`, which names `key`."""
        host, colon, port = (self.address, ":", str(self.port)) if self.port is not None else self._split()
        if not colon or not host or not port.isdecimal():
            raise GatewayConfigError(f"{key}: host:port, or host with the key port, expected, got {self.address!r:.80}")
        return host.strip("[]"), int(port)

    def _split(self) -> tuple[str, str, str]:
        return self.address.rpartition(":")


class MutualTls(_Section):
    """`tls.mutual`: the CA of client certificates, that of the KMS; a certificate is optional unless mandatory."""

    ca_certs: FilePath
    mandatory: bool = False


class Tls(_Section):
    """`tls`: the files of the RPC listener, which are written at the start if `core.rpc_domain` is set."""

    key: FilePath
    certs: FilePath
    mutual: MutualTls


class WgSection(_Section):
    """`core.wg`: the pool of addresses. Without a `public_key` one is made, since no interface has one."""

    public_key: str = ""
    private_key: str = Field(default="", repr=False)
    listen_port: Port = 51820
    ip: Interface = IPv4Interface("10.0.0.1/24")
    reserved_net: Annotated[tuple[Network, ...], Field(strict=False)] = (IPv4Network("10.0.0.1/32"),)
    client_ip_range: Network = IPv4Network("10.0.0.0/25")
    config_path: str = "/etc/wireguard/wg0.conf"
    interface: str = "wg0"
    endpoint: str = "10.0.2.2:51820"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        network = self.ip.network
        if not all(net.subnet_of(network) for net in self.reserved_net):
            raise ValueError("Reserved net is not in the network")
        if not any(self.ip.ip in net for net in self.reserved_net):
            raise ValueError("Wg peer IP is not in the reserved net")
        if not self.client_ip_range.subnet_of(network):
            raise ValueError("Client IP range is not in the network")
        return self


class TimeoutsSection(_Section):
    """`core.proxy.timeouts`, in seconds. `write` has no effect in upstream either."""

    connect: Duration = 5.0
    handshake: Duration = 5.0
    cache_top_n: Duration = 30.0
    handshake_stale: Duration = 1800.0
    dns_resolve: Duration = 5.0
    data_timeout_enabled: bool = True
    idle: Duration = 600.0
    write: Duration = 5.0
    shutdown: Duration = 5.0
    total: Duration = 5 * 3600.0
    pp_header: Duration = 5.0


class PortPolicyFetchSection(_Section):
    """`core.proxy.port_policy_fetch`: how an instance's agent is asked for its policy; times in seconds."""

    timeout: Duration = 10.0
    max_retries: Annotated[int, Field(ge=0)] = 5
    backoff_initial: Duration = 1.0
    backoff_max: Duration = 30.0


class HealthCheckSection(_Section):
    """`core.proxy.health_check`: how agents are asked for the health of their apps; times in seconds.

    An agent that does not answer makes its app unhealthy once `failure_threshold` requests in a row have failed.
    """

    enabled: bool = True
    interval: Annotated[Duration, Field(gt=0)] = 5.0
    timeout: Annotated[Duration, Field(gt=0)] = 2.0
    concurrency: Annotated[int, Field(ge=1)] = 16
    failure_threshold: Annotated[int, Field(ge=1)] = 2


class ProxySection(_Section):
    """`core.proxy`: the ingress."""

    tls_crypto_provider: Literal["aws-lc-rs", "ring"] = "aws-lc-rs"
    tls_versions: Annotated[tuple[Literal["1.2", "1.3"], ...], Field(strict=False)] = ("1.2",)
    listen_addr: Address = IPv4Address("127.0.0.1")  # upstream: 0.0.0.0
    listen_port: Ports = (8443,)
    agent_port: Port = 8090
    buffer_size: Annotated[int, Field(ge=1)] = 65536
    connect_top_n: Annotated[int, Field(ge=0)] = 3
    localhost_enabled: bool = False
    workers: Annotated[int, Field(ge=0)] = 32
    thread_per_core: bool = True
    connection_rebalance: bool = True
    external_port: Port = 443
    base_domain: str | None = None
    cert_chain: Annotated[Path | None, Field(strict=False)] = None
    cert_key: Annotated[Path | None, Field(strict=False)] = None
    app_address_ns_prefix: str = "_dstack-app-address"
    app_address_ns_compat: bool = True
    app_address_dns_servers: SocketAddresses = ()
    max_connections_per_app: Annotated[int, Field(ge=0)] = 2000
    inbound_pp_enabled: bool = False
    tcp_splice: dict[str, Any] | None = None
    ktls: dict[str, Any] | None = None
    health_check: HealthCheckSection = HealthCheckSection()
    port_policy_fetch: PortPolicyFetchSection = PortPolicyFetchSection()
    timeouts: TimeoutsSection = TimeoutsSection()


class RecycleSection(_Section):
    """`core.recycle`: instances without a handshake for `timeout` are removed; it looks every `interval` (seconds)."""

    enabled: bool = True
    interval: Duration = 300.0
    timeout: Duration = 36000.0
    node_timeout: Duration = 600.0


class SyncSection(_Section):
    """`core.sync`: this node, and the folder of its state. Nothing is replicated."""

    enabled: bool = False
    node_id: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    my_url: str = "https://localhost:8011"
    interval: Duration = 60.0
    timeout: Duration = 30.0
    bootnode: str = ""
    data_dir: FilePath = Path("/dstack-gateway/data")
    persist_interval: Duration = 300.0
    sync_connections_enabled: bool = True
    sync_connections_interval: Duration = 30.0


class AuthSection(_Section):
    """`core.auth`: a webhook that is asked for each registration."""

    enabled: bool = False
    url: str = "http://localhost/app-auth"
    timeout: Duration = 5.0


class AdminSection(Listener):
    """`core.admin`: the listener of operators; credentials count in the releases that have them."""

    enabled: bool = False
    address: str = "127.0.0.1:8011"
    auth_token: str = Field(default="", repr=False, validation_alias=AliasChoices("auth_token", "admin_token"))
    htpasswd_file: str = ""
    insecure_no_auth: bool = False


class DebugSection(Listener):
    """`core.debug`: the listener for tests, and what is insecure."""

    address: str = "127.0.0.1:8012"
    insecure_enable_debug_rpc: bool = False
    insecure_localhost_backend: bool = False
    insecure_skip_attestation: bool = False


class Core(_Section):
    """`core`."""

    set_ulimit: bool = True
    rpc_domain: str = ""
    attestation: AttestationConfig = AttestationConfig()
    pccs_url: str | None = None
    auth: AuthSection = AuthSection()
    admin: AdminSection = AdminSection()
    debug: DebugSection = DebugSection()
    wg: WgSection = WgSection()
    proxy: ProxySection = ProxySection()
    recycle: RecycleSection = RecycleSection()
    sync: SyncSection = SyncSection()

    @property
    def pccs(self) -> str:
        """Return the URL of the PCCS: from next's key or, if that is empty, from the key of 0.5.x."""
        return self.attestation.urls.pccs or self.pccs_url or ""


class GatewayConfig(Listener):
    """The whole file; `address` is that of the RPC listener."""

    address: str = "127.0.0.1:8010"
    tls: Tls | None = None
    core: Core = Core()

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file; raise `ConfigError`, which names the file and each wrong key."""
        return validate(cls, read_toml(path), str(path))

    def require_usable(self) -> None:
        """Refuse what upstream does not start with; raise `GatewayConfigError`."""
        if self.core.sync.enabled and self.core.sync.node_id == 0:
            raise GatewayConfigError("core.sync: node_id must be greater than 0")
        _ = self.tls_files

    @property
    def tls_files(self) -> Tls:
        """Return the section `tls`; raise `GatewayConfigError` without one."""
        if self.tls is None:
            raise GatewayConfigError("Failed to extract tls config: the section tls is missing")
        return self.tls

    def has_localhost_backend(self, release: Release) -> bool:
        """Return whether the app id `localhost` is this machine; the key depends on the release."""
        debug = self.core.debug.insecure_localhost_backend
        return debug if release.gateway_localhost_key_in_debug else self.core.proxy.localhost_enabled
