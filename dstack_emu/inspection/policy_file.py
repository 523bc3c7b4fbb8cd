"""A policy file as `dstack-emu why` takes it: its bytes, read once, and the webhook whose rules they are for.

The decisions are those of `auth.policy` and `auth.allowlist`: there are no rules here.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final, Literal, Self

from dstack_emu.auth.allowlist import (
    Allowlist,
    evaluate_allowlist,
    normalize_id,
    parse_allowlist_boot_info,
)
from dstack_emu.auth.boot_info import PolicyDecision, parse_body, parse_boot_info
from dstack_emu.auth.config_file import read_config
from dstack_emu.auth.file import parse_allowlist_file
from dstack_emu.auth.policy import Contract, Policy, evaluate, knows_tee_variant, normalize_hex
from dstack_emu.auth.simple import parse_policy
from dstack_emu.auth.spelling import unread_keys

Kind = Literal["auth-simple", "dstack-auth"]

_NORMALIZE: Final[Mapping[Kind, Callable[[str], str]]] = MappingProxyType(
    {"auth-simple": normalize_hex, "dstack-auth": normalize_id}
)


@dataclass(frozen=True, slots=True)
class PolicyFile:
    """A policy file that can be used; `contract` is auth-simple's, and None for dstack-auth, which has one alone."""

    kind: Kind
    path: str
    content: bytes
    contract: Contract | None

    @classmethod
    def read(cls, path: str, contract: Contract | None) -> Self:
        """Read auth-simple's file under a contract, or dstack-auth's under None; raise `AuthConfigError`."""
        policy = cls("dstack-auth" if contract is None else "auth-simple", path, read_config(path), contract)
        policy._parse()
        return policy

    @property
    def document(self) -> dict[str, Any]:
        """Return the file's JSON, with the members that the webhook does not know."""
        document: dict[str, Any] = json.loads(self.content)
        return document

    def with_document(self, document: Mapping[str, Any]) -> Self:
        """Return the policy with another content."""
        return replace(self, content=json.dumps(document).encode())

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return a sentence for each key that the webhook does not read."""
        return unread_keys(self.document, Allowlist if self.contract is None else Policy)

    def normalized(self, text: str) -> str:
        """Return an id as the webhook compares it."""
        return _NORMALIZE[self.kind](text)

    def decide(self, boot_info: bytes, *, is_kms: bool) -> PolicyDecision:
        """Decide about a request's body; raise `AuthError` if it is no boot info."""
        if self.contract is None:
            received = parse_allowlist_boot_info(boot_info)
            return evaluate_allowlist(parse_allowlist_file(self.content, self.path), received, is_kms)
        received = parse_boot_info(parse_body(boot_info), checks_tee_variant=knows_tee_variant(self.contract))
        return evaluate(parse_policy(self.content, self.path), received, is_kms, contract=self.contract)

    def _parse(self) -> object:
        parse = parse_allowlist_file if self.contract is None else parse_policy
        return parse(self.content, self.path)
