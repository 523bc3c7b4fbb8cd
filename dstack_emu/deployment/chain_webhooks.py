"""The webhooks of a stack that ask a contract on a chain: what their settings may be."""

from dstack_emu.attest.release import Release, release
from dstack_emu.auth.errors import AuthConfigError
from dstack_emu.auth.eth_settings import EthSettings
from dstack_emu.deployment.config import AUTH_KINDS, StackConfig
from dstack_emu.deployment.errors import StackError
from dstack_emu.transport.validation import suggestion

SIDES = ("src", "dst")


def require_chain(config: StackConfig) -> None:
    """Verify the settings `auth`, `eth_rpc_url` and `kms_contract`; raise `StackError`, which says what is wrong."""
    for name, kind in config.auth.items():
        if name not in SIDES:
            raise StackError(f"auth: {' or '.join(SIDES)} expected, got {name!r:.60}")
        if kind not in AUTH_KINDS:
            near = suggestion(kind, AUTH_KINDS)
            raise StackError(f"auth of {name}: {' or '.join(AUTH_KINDS)} expected, got {kind!r:.60}{near}")
        if name in config.webhooks:
            raise StackError(f"auth of {name}: this KMS asks the webhook that `webhooks` names; leave one of them out")
    asking = [name for name in SIDES if config.asks_chain(name)]
    if asking:
        eth_settings(config, release(config.release))
    elif config.eth_rpc_url is not None or config.kms_contract is not None:
        raise StackError("eth_rpc_url and kms_contract are settings of webhooks that ask a chain: add `--auth eth`")


def eth_settings(config: StackConfig, of: Release) -> EthSettings:
    """Return the settings of the webhook of a KMS of that release; raise `StackError`."""
    if config.eth_rpc_url is None or config.kms_contract is None:
        missing = "eth_rpc_url" if config.eth_rpc_url is None else "kms_contract"
        raise StackError(
            f"{missing} is missing: a webhook that asks a chain needs its JSON-RPC (--eth-rpc-url URL) and the address "
            "of the DstackKms contract (--kms-contract ADDRESS)"
        )
    try:
        return EthSettings(config.eth_rpc_url, config.kms_contract, of.auth_eth_revision)
    except AuthConfigError as error:
        raise StackError(f"a webhook that asks a chain: {error}") from error
