"""The description of a stack: the line of `up --json`, and the file stack.json in the state folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dstack_emu.deployment.context import StackContext
from dstack_emu.deployment.foreign_parts import foreign_webhooks
from dstack_emu.deployment.gateway_names import CA_FILE, INGRESS
from dstack_emu.deployment.guests import RunningGuest
from dstack_emu.deployment.reach import AGENT_PORT
from dstack_emu.deployment.running_kms import RunningKms


def describe(context: StackContext, kms: Mapping[str, RunningKms], app: RunningGuest, kms_ca: Path) -> dict[str, Any]:
    """Return everything a client needs to know; `kms_ca` is the file with the KMS's root certificate."""
    config = context.config
    return {
        "services": dict(context.urls),
        "grpc": dict(context.grpc),
        "policies": {name: str(path) for name, path in context.policies.paths.items()},
        "webhooks": foreign_webhooks(kms.values()),
        "foreign_kms": {name: files for name, each in kms.items() if (files := each.files)},
        "root_ca": str(context.root_ca),
        "kms_ca": str(kms_ca),
        "kms": measured_by(kms),
        "app": {
            "app_id": app.domain.app_id.hex(),
            "instance_id": app.domain.instance_id.hex(),
            "compose_hash": app.domain.compose_hash.hex(),
            "dstack_sock": str(app.dstack_sock),
            "tappd_sock": str(app.tappd_sock),
            **({"grpc_sock": str(app.folder / "grpc.sock")} if config.grpc else {}),
            **({"decrypted_env": str(app.decrypted_env)} if app.decrypted_env else {}),
        },
        **_gateway(context, app),
        **({} if context.chain is None else {"chain": context.chain.description(config.auth)}),
        "env": {
            "DSTACK_SIMULATOR_ENDPOINT": str(app.dstack_sock),
            "TAPPD_SIMULATOR_ENDPOINT": str(app.tappd_sock),
            "DSTACK_EMU_SOCKETS": str(app.folder),
            "DSTACK_EMU_APP": app.url,
        },
        "state": str(context.state),
        "seed": config.seed,
        "release": config.release,
        "auth_contract": context.contract_of(),
        "kms_names": list(context.kms_names),
        "fresh": config.fresh,
    }


def _gateway(context: StackContext, app: RunningGuest) -> dict[str, Any]:
    """Return how the apps behind the gateway are reached, nothing without a gateway."""
    if not context.config.gateway:
        return {}
    return {
        "gateway": {
            "base_domain": context.config.base_domain,
            "ca": str(context.state / CA_FILE),
            "app_url": app_url(context, app.domain.instance_id.hex()),
        }
    }


def app_url(context: StackContext, instance_id: str) -> str:
    """Return the address of an instance's agent behind the gateway, as a VMM forms it for a machine."""
    port = context.urls[INGRESS].rpartition(":")[2]
    return f"https://{instance_id}-{AGENT_PORT}.{context.config.base_domain}{'' if port == '443' else f':{port}'}"


def measured_by(kms: Mapping[str, RunningKms]) -> dict[str, dict[str, Any]]:
    """Return the answer of each KMS to GetAttestationInfo, of those whose answer is known."""
    return {name: each.measured for name, each in kms.items() if each.measured is not None}
