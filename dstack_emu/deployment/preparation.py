"""What a stack needs before any part of it starts: its folder, its ports, its image, its instruments."""

import json
import re
import shutil
import tempfile
from collections.abc import Set
from contextlib import AsyncExitStack
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.release import release
from dstack_emu.auth.errors import AuthConfigError
from dstack_emu.auth.policy import parse_contract
from dstack_emu.deployment.chain_webhooks import require_chain
from dstack_emu.deployment.clock import wall_clock
from dstack_emu.deployment.config import BASE_DOMAIN, DESCRIPTION_FILE, VMM_WORKLOADS, StackConfig
from dstack_emu.deployment.context import CHAIN, ServicePorts, StackContext
from dstack_emu.deployment.errors import StackError
from dstack_emu.deployment.foreign_parts import require_foreign_parts
from dstack_emu.deployment.instrumentation import Instrumentation
from dstack_emu.deployment.own_app import NAME as OWN_APP
from dstack_emu.deployment.own_app import OwnApp
from dstack_emu.deployment.policy_files import PolicyFiles
from dstack_emu.deployment.running_kms import PERMANENT
from dstack_emu.deployment.service_logs import ServiceLogs
from dstack_emu.deployment.trust_domains import boot_domain
from dstack_emu.observability.journal import JournalError
from dstack_emu.observability.tracing import traces_url
from dstack_emu.simulator.errors import GuestError
from dstack_emu.simulator.guest_boot import require_kms_as_provider
from dstack_emu.simulator.image import OsImage
from dstack_emu.simulator.image_files import ImageFileError, load_image
from dstack_emu.simulator.intel import Intel
from dstack_emu.simulator.seed import Seed
from dstack_emu.simulator.vendor_state import VendorState, validity_of_issue
from dstack_emu.transport.files import replace_file
from dstack_emu.transport.ports import GRPC_PORTS, PORTS
from dstack_emu.transport.urls import is_http_url, shown_url

if TYPE_CHECKING:
    from dstack_emu.deployment.stack_chain import StackChain

LOOPBACK: Final = "127.0.0.1"
CHAIN_FILE: Final = "chain.jsonl"
"""The file of the stack's own chain, in the state folder."""
_NO_OTEL: Final = (
    "--otlp needs OpenTelemetry's SDK and exporter, which the extra `otel` installs: "
    "pip install 'dstack-emu[otel] @ git+https://github.com/OWNER/dstack-emu'"
)
MAX_DOMAIN: Final = 189
"""The maximum length of the base domain: 253 for a name, less a label of 63 and its dot."""
_LABEL: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_HOST_LABEL: Final = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
"""Of names of services of compose files, too, which may have underscores."""
MAX_NAME: Final = 253
"""The maximum length of a host's name."""


def prepare(
    config: StackConfig, logs: ServiceLogs, services: Set[str], closing: AsyncExitStack
) -> tuple[StackContext, dict[str, Any]]:
    """Make the context of a stack with these services, and read what an earlier run of its state folder left.

    What has to be closed is put on `closing`. The second value is the earlier run's description, empty if there is
    none. Raises `StackError`, or `ListenError` if a port is taken.
    """
    _require_release(config)
    require_foreign_parts(config)
    require_chain(config)
    services = services - {f"auth-{name}" for name in config.webhooks} | ({CHAIN} if config.runs_chain else set())
    app = OwnApp.of(config)
    state = _state_folder(config.state, closing)
    remembered = _remembered(state, config)
    ports = _bind(config, services, closing)
    seed = Seed.of(config.seed)
    instrumentation = _instrumentation(config, seed, closing)
    chain = _chain(config, state, seed, instrumentation, closing)
    context = StackContext(
        config=config,
        state=state,
        seed=seed,
        intel=_intel(config, seed),
        image=_load_image(config, seed),
        instrumentation=instrumentation,
        logs=logs,
        ports=ports,
        policies=PolicyFiles(
            (config.policies or state / "policies").absolute(),
            [name for name in PERMANENT if name not in config.webhooks and not config.asks_chain(name)],
        ),
        app=app if chain is None else app.with_id(chain.app_id(OWN_APP)),
        chain=chain,
    )
    context.require_names()
    _require_bootable(context, app)
    context.instrumentation.journal.scrub = context.scrub
    _export(context, closing)
    return context, remembered


def _require_bootable(context: StackContext, app: OwnApp) -> None:
    """Verify before anything starts that an app-compose of the user's own boots, and lets a KMS give the keys."""
    if app.spec.compose is None:
        return
    try:
        require_kms_as_provider(boot_domain(context, app.spec), ["https://kms-src"])
    except (FormatError, GuestError) as error:
        reason = str(error).removeprefix("app-compose: ")
        raise StackError(f"app-compose {context.config.app_compose}: {reason}") from error


def _state_folder(given: Path | None, closing: AsyncExitStack) -> Path:
    if given is None:
        folder = Path(tempfile.mkdtemp(prefix="dstack-emu-"))
        closing.callback(shutil.rmtree, folder, ignore_errors=True)
        return folder
    folder = given.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise StackError(
            f"the state folder {folder} cannot be made: {error.strerror}; name another one by --state"
        ) from error
    return folder


def _require_release(config: StackConfig) -> None:
    """Verify that release and contract exist, and that release and stack have what is set; raise `StackError`."""
    try:
        stack_release = release(config.release)
        if config.auth_contract is not None:
            parse_contract(config.auth_contract, "auth_contract")
    except (FormatError, AuthConfigError) as error:
        raise StackError(str(error)) from error
    if config.vmm_workload not in VMM_WORKLOADS:
        raise StackError(f"vmm_workload: {' or '.join(VMM_WORKLOADS)} expected, got {config.vmm_workload!r:.40}")
    if not config.vmm and (config.vmm_workload != VMM_WORKLOADS[0] or config.vmm_script_image is not None):
        raise StackError("vmm_workload and vmm_script_image are settings of a VMM, which this stack has not: add --vmm")
    _require_gateway(config)
    if config.auth_api_cache and not stack_release.auth_api_cache_seconds:
        raise StackError(
            f"auth_api_cache: a KMS of dstack {stack_release.name} keeps no answer of its webhook: "
            "leave it out, or choose another release"
        )


def _require_gateway(config: StackConfig) -> None:
    """Verify the settings of the gateway; raise `StackError`."""
    if not config.gateway and (config.base_domain != BASE_DOMAIN or config.app_host is not None):
        raise StackError("base_domain and app_host are settings of a gateway, which this stack has not: add --gateway")
    labels = config.base_domain.split(".")
    if len(labels) < 2 or len(config.base_domain) > MAX_DOMAIN or not all(map(_LABEL.fullmatch, labels)):
        raise StackError(
            "base_domain: a domain of at least two labels of lowercase letters, digits and hyphens expected, such as "
            f"{BASE_DOMAIN}, got {config.base_domain!r:.100}"
        )
    if config.app_host is not None and not _is_host(config.app_host):
        raise StackError(
            "app_host: a host name or an IP address expected, without scheme and port, such as 127.0.0.1 or my-app, "
            f"got {config.app_host!r:.100}"
        )


def _is_host(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return len(text) <= MAX_NAME and all(map(_HOST_LABEL.fullmatch, text.split(".")))
    return True


def write_state(path: Path, text: str) -> None:
    """Replace a file of a state folder; raise `StackError`."""
    try:
        replace_file(path, text.encode())
    except OSError as error:
        how = "make room, or let this user write to its folder, or name another one by --state"
        raise StackError(f"{path} cannot be written: {error.strerror}: {how}") from error


def _remembered(state: Path, config: StackConfig) -> dict[str, Any]:
    path = state / DESCRIPTION_FILE
    try:
        remembered = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise StackError(f"{path} cannot be read ({error}): give another --state folder") from error
    if not isinstance(remembered, dict) or not remembered:
        return {}
    for name, configured in (("seed", config.seed), ("release", config.release)):
        made_with = remembered.get(name)
        if made_with != configured:
            raise StackError(
                f"{state} was made with the {name} {made_with!r}, not {configured!r}: "
                f"give that {name}, or another --state folder"
            )
    return remembered


def _bind(config: StackConfig, services: Set[str], closing: AsyncExitStack) -> ServicePorts:
    """Bind every port, so that one that is taken is known before anything runs."""
    ports = ServicePorts(config.host)
    closing.callback(ports.close)
    defaults = {name: port for name, port in PORTS.items() if name in services}
    for name, default in {**defaults, **(GRPC_PORTS if config.grpc else {})}.items():
        setting = f"--port {name}=PORT; 0 takes a free one"
        if config.host != LOOPBACK:
            setting = f"--listen {config.host}, {setting}"
        ports.bind(name, config.ports.get(name, default), setting=setting)
    return ports


def _intel(config: StackConfig, seed: Seed) -> Intel:
    """Return the emulated vendor, whose collateral has the configured dates."""
    intel = Intel(seed)
    if config.collateral_issued is not None:
        try:
            intel.state = VendorState.dated(validity_of_issue(config.collateral_issued, wall_clock()))
        except FormatError as error:
            raise StackError(str(error)) from error
    return intel


def _load_image(config: StackConfig, seed: Seed) -> OsImage:
    """Return the image that every trust domain boots unless it names another."""
    folder = config.image_dir
    if folder is None:
        return OsImage.from_seed(seed.derive, version=release(config.release).version)
    try:
        return load_image(folder)
    except ImageFileError as error:
        raise StackError(str(error)) from error


def _chain(
    config: StackConfig, state: Path, seed: Seed, instrumentation: Instrumentation, closing: AsyncExitStack
) -> "StackChain | None":
    """Return the stack's own chain, None if it has none; raise `StackError`."""
    if not config.runs_chain:
        return None
    from dstack_emu.deployment.stack_chain import StackChain  # few stacks have a chain: the others start sooner

    file = None if config.state is None else state / CHAIN_FILE
    chain = StackChain.open(seed, release(config.release), instrumentation.clock.issue, file)
    closing.callback(chain.close)
    return chain


def _instrumentation(config: StackConfig, seed: Seed, closing: AsyncExitStack) -> Instrumentation:
    try:
        made = Instrumentation(seed, patience=config.patience, kept=config.journal_size, journal_file=config.journal)
    except JournalError as error:
        raise StackError(f"--journal: {error}") from error
    closing.callback(made.journal.close)
    return made


def _export(context: StackContext, closing: AsyncExitStack) -> None:
    """Export the journal to the configured collector, if there is one; raise `StackError`."""
    config, urls = context.config, context.urls
    if config.otlp is None:
        return
    if not is_http_url(config.otlp):
        raise StackError(
            "--otlp: the http or https URL of a collector expected, such as http://127.0.0.1:4318, "
            f"got {shown_url(config.otlp)!r:.100}"
        )
    try:
        from dstack_emu.observability.otlp import OtlpExport  # few stacks export, and its packages are an extra
    except ImportError as error:
        raise StackError(_NO_OTEL) from error
    export = OtlpExport(traces_url(config.otlp), config.release, lambda service: urls.get(service, ""))
    context.instrumentation.export(export)
    closing.push_async_callback(export.close)
