"""The settings of a stack: seed, addresses, folders.

Ports are those of `transport.ports` by default.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Final, Self

from dstack_emu.attest.release import DEFAULT
from dstack_emu.simulator.seed import DEFAULT_SEED
from dstack_emu.transport.ports import GRPC_PORTS, PORTS

JOURNAL_SIZE: Final = 2000
"""The number of calls that a stack's journal keeps in memory; older ones are dropped."""

BASE_DOMAIN: Final = "app.localhost"
"""The domain of apps behind the gateway of a stack: browsers and curl resolve names below `localhost` by themselves."""

VMM_WORKLOADS: Final = ("process", "docker")
"""What may run in the machines of a VMM, the default first."""

AUTH_KINDS: Final = ("simple", "eth")
"""What the webhook of a KMS may be that the stack runs: auth-simple, the default, or auth-eth-bun."""

DESCRIPTION_FILE: Final = "stack.json"
"""The file with the stack's description, in its state folder."""

TOKEN_FILE: Final = "control.token"  # noqa: S105 - the name of a file
"""The file with the token of the control API, in the state folder, of a stack whose control API demands one."""

STATE_VARIABLE: Final = "DSTACK_EMU_STATE"
"""The environment variable with a stack's state folder, for commands that look for one."""

TOKEN_VARIABLE: Final = "DSTACK_EMU_TOKEN"  # noqa: S105 - the name of a variable
"""The environment variable with that token: `up` uses it instead of a random one, and clients send it."""


@dataclass(frozen=True, slots=True)
class StackConfig:
    """Settings of one stack.

    `release` is the dstack release that everything is of: a name in `attest.release.RELEASES`. `auth_contract` is the
    contract of its webhooks, a name in `auth.policy.CONTRACTS` (None: that of the release). `state` is the folder
    for keys, sockets and policies (None: a temporary one, deleted at the end); `policies` another folder for the two
    policy files. With `fresh` it stops at the runbook's starting point. `host` is the address it listens on.
    `image_dir` is the OS image that everything boots, instead of the seed's. Records of calls are appended to the file
    `journal`; `journal_size` of them stay in memory. `patience` is for how many seconds the services wait for one
    another (None: as long as upstream's). With `grpc` agents and KMS serve gRPC, too. With `auth_api_cache` each KMS
    uses a successful answer of its webhook about itself for a second, as its release does; without it the next call
    heeds a changed policy. `collateral_issued` is the day on which the collateral was issued, ISO 8601 or `today`; it
    expires 30 days later (None: collateral that is valid from 2024 to 2099). `control_token` is
    the token of the control API on an address that is not of this machine alone (None: that of the state folder, or a
    random one). `domains` are the names in the certificates of its KMS, beside the address, the first one their domain
    (none: the address). Ports that are not given are those of PORTS and GRPC_PORTS.

    `webhooks` has the URL of a webhook of your own, by the name of the KMS that asks it, `src` or `dst`. `kms` has, by
    the same names, the command line of a KMS of your own (`{config}` is the path of its kms.toml), or its URL, or
    `external`, if you start it yourself. It is waited for `kms_wait` seconds (None: 60 for a command, else 600).

    `auth` is the kind of webhook that the stack runs for a KMS, by the same names: one of AUTH_KINDS. Webhooks of the
    kind `eth` ask the contract `kms_contract` (an address) of the chain whose JSON-RPC is `eth_rpc_url`; the stack has
    no policy for those KMS. Without both, the stack runs a chain of its own, with the contracts, and sends the
    transactions that allow its KMS and its app. For `eth_block_cache` seconds of the stack's clock these webhooks use
    the number of the latest block again, as upstream's do for 4 s.

    `app_compose` is the file whose bytes are the identity of the stack's app (None: a generated one), `user_config` the
    app's own file. The variables in `env_file` are encrypted for the app, as a deployer does it; the app's guest drops
    those that `allowed_envs` of its app-compose does not name.

    With `vmm` it has a VMM, which deploys machines. `vmm_workload` is what runs in them: `process`, or `docker` for
    their containers on the engine of this host, where scripts of an app run in a container of `vmm_script_image` (None:
    of the image of the app's first service).

    With `gateway` it has a gateway and its ingress, whose names end with `base_domain`. What listens at the ports of a
    trust domain that is no machine, such as the stack's own app, is at the same ports of the host `app_host` (None: of
    this machine's loopback interface, if the stack itself listens there alone).

    `otlp` is the URL of a collector of OpenTelemetry, to which each recorded call is sent as spans.
    """

    seed: str = DEFAULT_SEED
    release: str = DEFAULT.name
    auth_contract: str | None = None
    fresh: bool = False
    host: str = "127.0.0.1"
    ports: Mapping[str, int] = field(default_factory=lambda: PORTS)
    state: Path | None = None
    policies: Path | None = None
    grpc: bool = False
    image_dir: Path | None = None
    journal: Path | None = None
    journal_size: int = JOURNAL_SIZE
    patience: float | None = None
    auth_api_cache: bool = False
    collateral_issued: str | None = None
    domains: tuple[str, ...] = ()
    control_token: str | None = None
    webhooks: Mapping[str, str] = field(default_factory=dict)
    auth: Mapping[str, str] = field(default_factory=dict)
    eth_rpc_url: str | None = None
    kms_contract: str | None = None
    eth_block_cache: float = 0.0
    kms: Mapping[str, str] = field(default_factory=dict)
    kms_wait: float | None = None
    app_compose: Path | None = None
    env_file: Path | None = None
    user_config: Path | None = None
    vmm: bool = False
    vmm_workload: str = VMM_WORKLOADS[0]
    vmm_script_image: str | None = None
    gateway: bool = False
    base_domain: str = BASE_DOMAIN
    app_host: str | None = None
    otlp: str | None = None

    def asks_chain(self, kms: str) -> bool:
        """Return whether the webhook of a KMS, by its name, is the stack's auth-eth-bun."""
        return self.auth.get(kms) == "eth"

    @property
    def runs_chain(self) -> bool:
        """Whether the stack has a chain of its own."""
        return "eth" in self.auth.values() and self.eth_rpc_url is None and self.kms_contract is None

    @classmethod
    def on_free_ports(cls, **settings: object) -> Self:
        """Make settings with a free port for each service; raise `TypeError` for a name that is no setting."""
        known = [each.name for each in fields(cls)]
        for name in settings:
            if name not in known:
                from dstack_emu.transport.validation import suggestion  # slow to import, and not needed otherwise

                raise TypeError(f"a stack has no setting {name!r}{suggestion(name, known)}")
        return cls(**settings, ports=dict.fromkeys([*PORTS, *GRPC_PORTS], 0))  # type: ignore[arg-type]  # fields by name
