"""The routes of the control API about the chain of a stack."""

from typing import Any, Final

from dstack_emu.control.api import Control
from dstack_emu.control.chain_schemas import BODIES
from dstack_emu.control.route import Route, given, number

_SUMMARIES: Final = {
    "allow": "Allow an OS image, a KMS, its device, or a compose hash or device of an app",
    "remove": "Remove one of these",
    "app-deploy": "Create the contract of an app, and register it",
    "app-register": "Register a contract that exists as an app",
    "app-set": "Change a setting of an app",
    "kms-set": "Change a setting of DstackKms",
    "kms-info": "Publish the keys and the evidence of a KMS",
    "transfer-ownership": "Hand DstackKms, or an app, over",
    "accept-ownership": "Become the owner that was named",
    "upgrade": "Replace the implementation of DstackKms, or of an app",
}


def _transactions(control: Control, path: dict[str, str], query: dict[str, str], body: Any) -> list[dict[str, Any]]:
    since = number(query, "since", 0) if "since" in query else -1
    return control.chain_transactions(since=since, limit=number(query, "limit", 1000))


def _act(act: str) -> Route:
    return Route("POST", f"/chain/{act}", _SUMMARIES[act], lambda c, p, q, b: c.chain_act(act, **given(b)), BODIES[act])


CHAIN_ROUTES: Final = (
    Route("GET", "/chain", "What the contracts on the stack's chain hold and decide", lambda c, p, q, b: c.chain()),
    Route(
        "GET",
        "/chain/transactions",
        "Its transactions after a block (`since`), with their events",
        _transactions,
        query=("since", "limit"),
    ),
    *map(_act, BODIES),
)
