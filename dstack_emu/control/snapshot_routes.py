"""The routes of the control API about snapshots."""

from typing import Any, Final

from dstack_emu.control.api import Control
from dstack_emu.control.route import Nothing, Route
from dstack_emu.control.schemas import SnapshotRequest


async def _revert(control: Control, path: dict[str, str], query: dict[str, str], body: Any) -> None:
    await control.revert(path["name"])


SNAPSHOT_ROUTES: Final = (
    Route("GET", "/snapshots", "The names of all snapshots", lambda c, p, q, b: c.snapshots()),
    Route(
        "POST",
        "/snapshots",
        "Take a snapshot",
        lambda c, p, q, b: {"name": c.snapshot(b.name)},
        SnapshotRequest,
    ),
    Route("DELETE", "/snapshots/{name}", "Delete a snapshot", lambda c, p, q, b: c.forget_snapshot(p["name"])),
    Route(
        "GET",
        "/snapshots/{name}/differences",
        "What differs between a snapshot and another one (`to`), or the present state",
        lambda c, p, q, b: c.differences(p["name"], q.get("to")),
        query=("to",),
    ),
    Route(
        "GET",
        "/snapshots/{name}/comparison",
        "The same part by part, for people, with policies as diffs",
        lambda c, p, q, b: c.comparison(p["name"], q.get("to")),
        query=("to",),
    ),
    Route(
        "GET",
        "/snapshots/{name}/policies/{kms}",
        "A policy as a snapshot has it",
        lambda c, p, q, b: c.snapshot_policy(p["name"], p["kms"]),
    ),
    Route("POST", "/snapshots/{name}/revert", "Restore a snapshot", _revert, Nothing),
    Route("POST", "/reset", "Restore the state in which the stack became ready", lambda c, p, q, b: c.reset(), Nothing),
)
