"""vmm.toml: what a VMM is configured with, with upstream's names and defaults.

Unknown keys are accepted, as upstream does; a value of another type is refused. Some keys have no effect here, and
stand here because upstream refuses wrong values of them. Source: dstack `vmm/vmm.toml` and `vmm/src/config.rs` at
312dc605.
"""

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from dstack_emu.transport.settings import FilePath, Port, read_toml, validate

Protocol = Literal["tcp", "udp"]
LOCAL_ADDRESS: Final = "127.0.0.1"


_SIZE: Final = re.compile(r"([0-9]{1,15}) ?([KMGT]?)B?", re.IGNORECASE)
_UNITS: Final = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def _size(value: Any) -> Any:
    """Parse `4M` as bytes; leave a number as it is."""
    if isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        return int(match[1]) * _UNITS[match[2].lower()]
    return value


HumanSize = Annotated[int, BeforeValidator(_size), Field(ge=0)]


def _ip_address(value: str) -> str:
    try:
        return str(ipaddress.ip_address(value))
    except ValueError as error:
        raise ValueError(f"an IP address expected, got {value!r:.80}") from error


def _vsock_address(value: str) -> str:
    """Check `vsock:CID`, whose CID is decimal, or hex after `0x`."""
    if not _VSOCK.fullmatch(value):
        raise ValueError(f"vsock:CID expected, such as vsock:2, got {value!r:.80}")
    return value


_VSOCK: Final = re.compile(r"vsock:([0-9]{1,10}|0x[0-9A-Fa-f]{1,8})")
IpAddress = Annotated[str, AfterValidator(_ip_address)]
VsockAddress = Annotated[str, AfterValidator(_vsock_address)]
Texts = Annotated[tuple[str, ...], Field(strict=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, populate_by_name=True)


class PortRange(_Section):
    """Host ports of one protocol that may be mapped, both ends included."""

    protocol: Protocol
    first: Port = Field(validation_alias="from")
    last: Port = Field(validation_alias="to")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.first > self.last:
            raise ValueError(f"from must not be above to, got {self.first} and {self.last}")
        return self


class PortMappingSection(_Section):
    """`cvm.port_mapping`: whether and which host ports may be mapped, and the address if a mapping names none."""

    enabled: bool = False
    address: IpAddress = LOCAL_ADDRESS
    range: tuple[PortRange, ...] = Field(default=(PortRange(protocol="tcp", first=1, last=20000),), strict=False)

    def allows(self, protocol: str, port: int) -> bool:
        """Return whether a host port may be mapped."""
        return any(each.protocol == protocol and each.first <= port <= each.last for each in self.range)


class GpuSection(_Section):
    """`cvm.gpu`: no GPU is ever found; with `enabled` requests may name some."""

    enabled: bool = False
    listing: Texts = ("10de:2335",)
    exclude: Texts = ()
    include: Texts = ()
    allow_attach_all: bool = True


class NetworkingSection(_Section):
    """`cvm.networking`: the network of a machine that names none, and what the MAC addresses of all begin with.

    `mac_prefix` has up to three bytes, in hex and with colons between them.
    """

    mode: Literal["user", "bridge", "custom"] = "user"
    bridge: str = ""
    mac_prefix: Annotated[str, Field(pattern=r"^([0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){0,2})?$")] = ""
    netdev: str = ""
    vhost: bool = False


class NetworkFilterSection(_Section):
    """`cvm.network_filter`: without effect, because there is no bridge."""

    mode: Literal["none", "libvirt"] = "none"


class AutoRestartSection(_Section):
    """`cvm.auto_restart`: when machines that ended by themselves are started again; times in seconds.

    It looks every `interval`. The pause before an attempt is `initial_backoff`, and doubles up to `max_backoff`. After
    `max_retries` attempts it gives up, unless the machine has run for `reset_window` without a break.
    """

    enabled: bool = True
    interval: Annotated[int, Field(ge=0)] = 20
    max_retries: Annotated[int, Field(ge=0)] = 5
    initial_backoff: Annotated[int, Field(ge=0)] = 5
    max_backoff: Annotated[int, Field(ge=0)] = 300
    reset_window: Annotated[int, Field(ge=0)] = 300

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.enabled:
            if self.interval == 0:
                raise ValueError("interval must be greater than zero when enabled")
            if self.initial_backoff == 0:
                raise ValueError("initial_backoff must be greater than zero when enabled")
            if self.initial_backoff > self.max_backoff:
                raise ValueError("initial_backoff must not exceed max_backoff")
        return self


class LogSection(_Section):
    """`cvm.log`: a log above `max_bytes` (0: never) begins anew, and `max_backups` earlier ones are kept."""

    max_bytes: HumanSize = 4 << 20
    max_backups: Annotated[int, Field(ge=0)] = 3
    check_interval_secs: Annotated[int, Field(ge=0)] = 5


class CvmSection(_Section):
    """`cvm`: what machines get, and the limits on them. `serial_history_max_bytes` is a key of 0.5 alone."""

    platform: Literal["auto", "tdx", "amd-sev-snp"] = "auto"
    kms_urls: Texts = ("http://127.0.0.1:8081",)
    gateway_urls: Texts = ("http://127.0.0.1:8082",)
    pccs_url: str = ""
    nvidia_attestation_proxy_url: str | None = None
    docker_registry: str = ""
    cid_start: Annotated[int, Field(ge=3)] = 1000
    cid_pool_size: Annotated[int, Field(ge=1)] = 1000
    max_net_queues: Annotated[int, Field(ge=1, le=64)] = 16
    max_allocable_vcpu: Annotated[int, Field(ge=0)] = 20
    max_allocable_memory_in_mb: Annotated[int, Field(ge=0)] = 100_000
    volumes_dir: str = ""
    serial_history_max_bytes: HumanSize = 4 << 20
    host_share_mode: str = "9p"
    port_mapping: PortMappingSection = PortMappingSection()
    networking: NetworkingSection = NetworkingSection()
    network_filter: NetworkFilterSection = NetworkFilterSection()
    gpu: GpuSection = GpuSection()
    auto_restart: AutoRestartSection = AutoRestartSection()
    log: LogSection = LogSection()
    tee_simulator: dict[str, Any] | None = None


class GatewaySection(_Section):
    """`gateway`: how the apps of machines are reached."""

    base_domain: str = "localhost"
    port: Port = 8082
    agent_port: Port = 8090


class AuthSection(_Section):
    """`auth`: the credentials of callers. With `enabled` and none configured, every call is refused."""

    enabled: bool = False
    tokens: Texts = ()
    htpasswd_file: str = ""


class ImageSection(_Section):
    """`image`: the folder of local OS images, and the repository that images are pulled from, such as `HOST/NAME`."""

    path: FilePath = Path("./images")
    registry: str = ""


class SupervisorSection(_Section):
    """`supervisor`: without effect, because machines have no processes."""

    exe: str = "./supervisor"
    sock: str = "./run/supervisor.sock"
    pid_file: str = "./run/supervisor.pid"
    log_file: str = "./run/supervisor.log"
    auto_start: bool = True


class HostApiSection(_Section):
    """`host_api`: without effect, because guests and VMM are in one process."""

    address: VsockAddress = "vsock:2"
    port: Annotated[int, Field(ge=1, le=0xFFFF_FFFF)] = 10000


class KeyProviderSection(_Section):
    """`key_provider`: without effect, because a machine with a local key provider has its key at once."""

    enabled: bool = True
    address: IpAddress = LOCAL_ADDRESS
    port: Port = 3443


class VmmConfig(_Section):
    """The configuration of one VMM. `run_path` is the folder of its machines.

    `image_path` is the older name of `image.path`, which counts if there are both.
    """

    address: str = "unix:./vmm.sock"
    port: Port | None = None
    image_path: FilePath | None = None
    run_path: FilePath = Path("./run/vm")
    kms_url: str = "http://127.0.0.1:8081"
    event_buffer_size: Annotated[int, Field(ge=1)] = 20
    node_name: str = ""
    image: ImageSection = ImageSection()
    cvm: CvmSection = CvmSection()
    gateway: GatewaySection = GatewaySection()
    auth: AuthSection = AuthSection()
    supervisor: SupervisorSection = SupervisorSection()
    host_api: HostApiSection = HostApiSection()
    key_provider: KeyProviderSection = KeyProviderSection()

    @model_validator(mode="after")
    def _images_by_their_older_name(self) -> Self:
        if self.image_path is None or "path" in self.image.model_fields_set:
            return self
        return self.model_copy(update={"image": ImageSection(path=self.image_path)})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file; raise `ConfigError`, which names the file and each wrong key."""
        return validate(cls, read_toml(path), str(path))
