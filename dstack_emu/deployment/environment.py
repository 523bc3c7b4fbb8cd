"""The environment variables that name the services of a running stack. docs/configuration.md lists them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from dstack_emu.deployment.config import DESCRIPTION_FILE, STATE_VARIABLE, TOKEN_VARIABLE

URLS: Final[Mapping[str, str]] = {
    "DSTACK_EMU_PCCS": "pccs",
    "DSTACK_EMU_AUTH_SRC": "auth-src",
    "DSTACK_EMU_AUTH_DST": "auth-dst",
    "DSTACK_EMU_AGENT_SRC": "agent-src",
    "DSTACK_EMU_AGENT_DST": "agent-dst",
    "DSTACK_EMU_KMS_SRC": "kms-src",
    "DSTACK_EMU_KMS_DST": "kms-dst",
    "DSTACK_EMU_APP": "app",
    "DSTACK_EMU_VERIFIER": "verifier",
    "DSTACK_EMU_CONTROL": "control",
}
"""Variables with the URLs of services."""
GATEWAY_URLS: Final[Mapping[str, str]] = {
    "DSTACK_EMU_GATEWAY": "gateway",
    "DSTACK_EMU_GATEWAY_ADMIN": "gateway-admin",
    "DSTACK_EMU_INGRESS": "ingress",
}
"""Variables with the addresses of a gateway's listeners, if the stack has one."""
CHAIN_URLS: Final = ("DSTACK_EMU_CHAIN", "ETH_RPC_URL")
"""Variables with the URL of the stack's own chain: ours, and that of upstream's webhooks, cast and forge."""
CONTRACT_VARIABLE: Final = "KMS_CONTRACT_ADDR"
"""The variable from which upstream's webhooks and scripts take the address of DstackKms."""
VMM_VARIABLE: Final = "DSTACK_VMM_URL"
"""The variable from which vmm-cli.py takes the URL of the VMM, if the stack has one."""


def environment(description: Mapping[str, Any], token: str | None = None) -> dict[str, str]:
    """Return the variables by which a command finds the stack of this description, with its token if there is one."""
    webhooks = {f"auth-{name}": url for name, url in description["webhooks"].items()}
    services, policies = {**description["services"], **webhooks}, description["policies"]
    return {
        **description["env"],
        **{variable: services[name] for variable, name in URLS.items()},
        **({VMM_VARIABLE: services["vmm"]} if "vmm" in services else {}),
        **{variable: services[name] for variable, name in GATEWAY_URLS.items() if name in services},
        **_gateway(description),
        **_chain(description),
        # A webhook of the user's own has no policy here: the variable is empty, so that no other stack's is taken.
        "DSTACK_EMU_POLICY_SRC": policies.get("src", ""),
        "DSTACK_EMU_POLICY_DST": policies.get("dst", ""),
        "DSTACK_EMU_ROOT_CA": description["root_ca"],
        "DSTACK_EMU_KMS_CA": description["kms_ca"],
        STATE_VARIABLE: description["state"],
        "DSTACK_EMU_STACK": str(Path(description["state"], DESCRIPTION_FILE)),
        **({} if token is None else {TOKEN_VARIABLE: token}),
    }


def _chain(description: Mapping[str, Any]) -> dict[str, str]:
    chain = description.get("chain")
    if chain is None:
        return {}
    urls = dict.fromkeys(CHAIN_URLS, description["services"]["chain"])
    return {**urls, CONTRACT_VARIABLE: chain["contracts"]["kms"]}


def _gateway(description: Mapping[str, Any]) -> dict[str, str]:
    gateway = description.get("gateway")
    if gateway is None:
        return {}
    names = {"base_domain": "DSTACK_EMU_BASE_DOMAIN", "ca": "DSTACK_EMU_GATEWAY_CA", "app_url": "DSTACK_EMU_APP_URL"}
    return {variable: gateway[key] for key, variable in names.items()}
