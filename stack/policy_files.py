"""The two auth-simple policy files of a stack, written so that nobody ever reads half of one.

Plain JSON that a person edits while the stack runs: auth-simple reads it anew for every question.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

DENY_ALL: Final[dict[str, Any]] = {
    "osImages": [],
    "gatewayAppId": "any",
    "kms": {"mrAggregated": [], "devices": [], "allowAnyDevice": True},
    "apps": {},
}
"""The runbook's placeholder: an empty list of measurements denies every KMS."""


@dataclass(frozen=True, slots=True)
class AppRule:
    """An app that a policy admits: id and compose hash as hex without 0x."""

    app_id: str
    compose_hash: str


def allow(os_images: list[str], mr_aggregated: list[str], apps: list[AppRule]) -> dict[str, Any]:
    """Make a policy that admits these measurements (hex without 0x) on any device."""
    return {
        **DENY_ALL,
        "osImages": sorted({f"0x{image}" for image in os_images}),
        "kms": {"mrAggregated": [f"0x{mr}" for mr in mr_aggregated], "devices": [], "allowAnyDevice": True},
        "apps": {
            f"0x{app.app_id}": {"composeHashes": [f"0x{app.compose_hash}"], "devices": [], "allowAnyDevice": True}
            for app in apps
        },
    }


def is_placeholder(path: Path) -> bool:
    """Whether a policy is still the placeholder that a stack wrote: nobody's own."""
    try:
        policy: object = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return policy == DENY_ALL


def place(paths: Iterable[Path]) -> None:
    """Put the placeholder where there is no policy yet, and make its folder."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write(path, DENY_ALL)


def write(path: Path, policy: dict[str, Any]) -> None:
    """Put a policy in place at once."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(json.dumps(policy, indent=2) + "\n")
    if os.geteuid() == 0:  # in a container: whoever has the folder has to be able to edit the policies in it
        owner = path.parent.stat()
        os.chown(temporary, owner.st_uid, owner.st_gid)
    os.replace(temporary, path)
