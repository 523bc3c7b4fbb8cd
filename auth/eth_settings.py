"""What auth-eth-bun takes from its environment, except its address; and what differs between its two revisions.

Source: dstack, `kms/auth-eth-bun/index.ts` at 40eaf35e (0.5.11) and next 312dc605. AUTH_ETH_COMPAT and
AUTH_ETH_BLOCK_CACHE are ours.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.eth_address import decode_address
from dstack_emu.attest.release import DEFAULT, AuthEthRevision
from dstack_emu.auth.errors import AuthConfigError
from dstack_emu.transport.urls import is_http_url, shown_origin, shown_url

BACKEND_UNAVAILABLE: Final = "authorization backend unavailable"
"""What next says of every failure behind it."""
DEFAULT_RPC_URL: Final = "http://localhost:8545"
NO_CONTRACT: Final = "0x" + "00" * 20
"""Upstream's default, at which there is no contract: everything is denied."""
RPC_TIMEOUT: Final = 10.0
"""Seconds for each call of the chain, as viem's default."""
VIEM_BLOCK_CACHE: Final = 4.0
"""Seconds for which upstream's client uses the number of the latest block again (viem's `cacheTime`)."""
MAX_BLOCK_CACHE: Final = 3600.0

_MAX_SAFE_INTEGER: Final = 2**53 - 1
_INTEGER: Final = re.compile("0|[1-9][0-9]*")
_SECONDS: Final = re.compile(r"[0-9]{1,4}(?:\.[0-9]{1,6})?")


@dataclass(frozen=True, slots=True)
class EthRules:
    """What differs between the revisions."""

    reads_confirmed_block: bool
    """Checks the chain id, and asks about the state of one block, which has ETH_FINALITY_CONFIRMATIONS blocks after it;
    otherwise each call is about the latest state."""
    bounds_request: bool
    """Refuses members that are too long or no hex, with an answer of its own; otherwise mistyped ones alone, as zod."""
    hides_cause: bool
    """Answers every failure behind it with the same text, and shows scheme and host of the RPC URL alone."""


RULES: Final[Mapping[AuthEthRevision, EthRules]] = MappingProxyType(
    {
        "0.5.11": EthRules(reads_confirmed_block=False, bounds_request=False, hides_cause=False),
        "next": EthRules(reads_confirmed_block=True, bounds_request=True, hides_cause=True),
    }
)


@dataclass(frozen=True, slots=True)
class EthSettings:
    """The chain that is asked, and how.

    `chain_id` None is any. `confirmations` are blocks. `block_cache` is how long the number of the latest block is used
    again, in seconds. All three have an effect in next alone. `timeout` is for each call of the chain, in seconds.
    """

    rpc_url: str = DEFAULT_RPC_URL
    kms_contract: str = NO_CONTRACT
    revision: AuthEthRevision = DEFAULT.auth_eth_revision
    chain_id: int | None = None
    confirmations: int = 0
    block_cache: float = 0.0
    timeout: float = RPC_TIMEOUT

    def __post_init__(self) -> None:
        if not is_http_url(self.rpc_url):
            raise AuthConfigError(f"ETH_RPC_URL: http(s)://host:port expected, got {shown_url(self.rpc_url)!r:.200}")
        try:
            decode_address(self.kms_contract)
        except FormatError as error:
            raise AuthConfigError(f"KMS_CONTRACT_ADDR: {error}") from error

    @classmethod
    def from_env(cls, env: Mapping[str, str], *, default_revision: AuthEthRevision) -> "EthSettings":
        """Read the variables; an empty value is an absent one. Raises `AuthConfigError`, which names the variable.

        0.5.11 does not read ETH_CHAIN_ID, ETH_FINALITY_CONFIRMATIONS and AUTH_ETH_BLOCK_CACHE (`unread_variables`).
        """
        revision = parse_revision(env.get("AUTH_ETH_COMPAT") or default_revision)
        used = env if RULES[revision].reads_confirmed_block else {}
        return cls(
            rpc_url=env.get("ETH_RPC_URL") or DEFAULT_RPC_URL,
            kms_contract=env.get("KMS_CONTRACT_ADDR") or NO_CONTRACT,
            revision=revision,
            chain_id=_parse_integer("ETH_CHAIN_ID", used),
            confirmations=_parse_integer("ETH_FINALITY_CONFIRMATIONS", used) or 0,
            block_cache=parse_block_cache(used.get("AUTH_ETH_BLOCK_CACHE") or "0"),
        )

    @property
    def rules(self) -> EthRules:
        """Return what its revision does."""
        return RULES[self.revision]

    @property
    def answered_rpc_url(self) -> str:
        """Return the URL as `GET /` names it: next has scheme and host alone, 0.5.11 all, here without credentials."""
        return (shown_origin if self.rules.hides_cause else shown_url)(self.rpc_url)


def unread_variables(settings: EthSettings, env: Mapping[str, str]) -> tuple[str, ...]:
    """Name the variables that are set, and that the revision does not read."""
    names = ("ETH_CHAIN_ID", "ETH_FINALITY_CONFIRMATIONS", "AUTH_ETH_BLOCK_CACHE")
    return () if settings.rules.reads_confirmed_block else tuple(name for name in names if env.get(name))


def parse_revision(text: str) -> AuthEthRevision:
    """Return the revision of exactly this name, or raise `AuthConfigError`."""
    for revision in RULES:
        if revision == text:
            return revision
    raise AuthConfigError(f'AUTH_ETH_COMPAT is "{text}", expected one of {", ".join(RULES)}')


def parse_block_cache(text: str) -> float:
    """Return seconds, with at most six decimals; raise `AuthConfigError`."""
    if not _SECONDS.fullmatch(text) or float(text) > MAX_BLOCK_CACHE:
        raise AuthConfigError(f'AUTH_ETH_BLOCK_CACHE is "{text}", expected seconds from 0 to {MAX_BLOCK_CACHE:g}')
    return float(text)


def _parse_integer(name: str, env: Mapping[str, str]) -> int | None:
    """Return a number; the texts of the errors are upstream's."""
    text = env.get(name)
    if not text:
        return None
    if not _INTEGER.fullmatch(text):
        raise AuthConfigError(f'{name} must be a non-negative integer, got "{text:.80}"')
    if len(text) > 16 or int(text) > _MAX_SAFE_INTEGER:
        raise AuthConfigError(
            f'{name} exceeds the safe integer range, which ends at {_MAX_SAFE_INTEGER}, got "{text:.80}"'
        )
    return int(text)
