"""The errors of the webhooks: one family, `AuthError`.

A denial is not an error: it is a `PolicyDecision`. An error is what keeps a webhook from deciding: its own
configuration, or a request that is not one.
"""

from collections.abc import Sequence
from typing import TypedDict

from dstack_emu.transport.errors import ConfigError


class Issue(TypedDict):
    """One entry of a zod 3 error, in the key order zod writes."""

    code: str
    expected: str
    received: str
    path: list[str | int]
    message: str


class AuthError(Exception):
    """Anything this package refuses."""


class AuthConfigError(AuthError, ConfigError):
    """A setting or a config file that cannot be used: which one, what was got, and what is expected."""


class MalformedJsonError(AuthError):
    """A request body that is not JSON text."""


class OversizedJsonError(AuthError):
    """A request body with more JSON values than a boot info has; the text has the bound."""


class BootInfoError(AuthError):
    """A JSON body that is no boot info; `issues` lists every fault, in schema order."""

    def __init__(self, issues: Sequence[Issue]) -> None:
        super().__init__("; ".join(f"{issue['path']}: {issue['message']}" for issue in issues))
        self.issues = tuple(issues)


class MistypedBootInfoError(AuthError):
    """A JSON body that dstack-auth cannot read as a boot info: which member, and why."""


class BootInfoBoundsError(AuthError):
    """A boot info with a member that is too long, or no hex: which one, what was got, and what is expected."""


class ChainError(AuthError):
    """A chain that gives no decision: what was called, what came, and what is expected; a node's error as it is."""
