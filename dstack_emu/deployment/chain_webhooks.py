"""The webhooks of a stack that ask a contract on a chain: what their settings may be."""

from dataclasses import dataclass

from dstack_emu.attest.release import Release, release
from dstack_emu.auth.errors import AuthConfigError
from dstack_emu.auth.eth_settings import MAX_BLOCK_CACHE, RULES, EthSettings
from dstack_emu.deployment.config import AUTH_KINDS, StackConfig
from dstack_emu.deployment.errors import StackError
from dstack_emu.transport.validation import suggestion

SIDES = ("src", "dst")


@dataclass(frozen=True, slots=True)
class AskedChain:
    """The chain that webhooks ask: its JSON-RPC, the address of its DstackKms, and its id (None: any)."""

    rpc_url: str
    kms_contract: str
    chain_id: int | None = None


def require_chain(config: StackConfig) -> None:
    """Verify the settings of webhooks, and of the chain that they ask; raise `StackError`, which says what is wrong."""
    for name, kind in config.auth.items():
        if name not in SIDES:
            raise StackError(f"auth: {' or '.join(SIDES)} expected, got {name!r:.60}")
        if kind not in AUTH_KINDS:
            near = suggestion(kind, AUTH_KINDS)
            raise StackError(f"auth of {name}: {' or '.join(AUTH_KINDS)} expected, got {kind!r:.60}{near}")
        if name in config.webhooks:
            raise StackError(f"auth of {name}: this KMS asks the webhook that `webhooks` names; leave one of them out")
    _require_block_cache(config)
    if config.runs_chain:
        return
    if any(map(config.asks_chain, SIDES)):
        eth_settings(given_chain(config), release(config.release))
    elif config.eth_rpc_url is not None or config.kms_contract is not None:
        raise StackError("eth_rpc_url and kms_contract are settings of webhooks that ask a chain: add `--auth eth`")


def _require_block_cache(config: StackConfig) -> None:
    if not config.eth_block_cache:
        return
    if not any(map(config.asks_chain, SIDES)):
        raise StackError("eth_block_cache is a setting of webhooks that ask a chain: add `--auth eth`")
    if not 0 < config.eth_block_cache <= MAX_BLOCK_CACHE:
        raise StackError(
            f"eth_block_cache: seconds from 0 to {MAX_BLOCK_CACHE:g} expected, got {config.eth_block_cache:g}"
        )
    if not RULES[release(config.release).auth_eth_revision].reads_confirmed_block:
        raise StackError(
            f"eth_block_cache: auth-eth of dstack {config.release} asks about the latest state, and keeps no number of "
            "a block: leave it out, or choose another release"
        )


def given_chain(config: StackConfig) -> AskedChain:
    """Return the chain that the settings name; raise `StackError` if one of both is missing."""
    if config.eth_rpc_url is None or config.kms_contract is None:
        missing = "eth_rpc_url" if config.eth_rpc_url is None else "kms_contract"
        raise StackError(
            f"{missing} is missing: a webhook that asks a given chain needs its JSON-RPC (--eth-rpc-url URL) and the "
            "address of the DstackKms contract (--kms-contract ADDRESS). Without both the stack runs a chain of its own"
        )
    return AskedChain(config.eth_rpc_url, config.kms_contract)


def eth_settings(chain: AskedChain, of: Release) -> EthSettings:
    """Return the settings of the webhook of a KMS of that release; raise `StackError`."""
    try:
        return EthSettings(chain.rpc_url, chain.kms_contract, of.auth_eth_revision, chain.chain_id)
    except AuthConfigError as error:
        raise StackError(f"a webhook that asks a chain: {error}") from error
