"""A denial in the journal, explained by the policy as it is now, as `dstack-emu why` explains evidence."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic.alias_generators import to_camel

from dstack_emu.auth.boot_info import Refusal
from dstack_emu.auth.errors import AuthError
from dstack_emu.auth.policy import Contract
from dstack_emu.inspection.json_lines import line_of
from dstack_emu.inspection.policy_change import smallest_change
from dstack_emu.inspection.policy_file import PolicyFile
from dstack_emu.inspection.why import refusal_document


def explain_denial(path: Path, contract: Contract, decision: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the policy refuses of it, where that stands in the file, and the smallest change that admits it.

    `refusals` is empty if the policy allows it now; `problem` says why there is no explanation. The change has the
    policy `before` and `after` it, its JSON Patch and a unified diff.
    """
    is_kms = decision["about"] == "kms"
    body = json.dumps({to_camel(name): value for name, value in decision["asked"].items()}).encode()
    try:
        policy = PolicyFile.read(str(path), contract)
        change = smallest_change(policy, body, is_kms=is_kms)
    except AuthError as error:
        return {"problem": str(error)}
    text = policy.content.decode("utf-8", "replace")
    return {
        "problem": None,
        "policy": str(path),
        "contract": contract,
        "refusals": [located(refusal, text) for refusal in change.refusals],
        "change": {"before": policy.document, "after": change.document, "patch": change.patch, "diff": change.diff}
        if change.patch
        else None,
        "no_change_because": change.obstacle or None,
    }


def located(refusal: Refusal, text: str) -> dict[str, Any]:
    """Return a refusal with the line of a policy's text that decided it; both are None if no line did."""
    line = line_of(text, refusal.path) if refusal.path else None
    lines = text.splitlines()
    shown = lines[line - 1].strip() if line is not None and line <= len(lines) else None
    return {**refusal_document(refusal), "line": line, "line_text": shown}
