"""What a webhook would find wrong with the text of a policy that is not written yet, and what it would change."""

import json
from pathlib import Path
from typing import Any

from dstack_emu.attest.strict_json import read_json
from dstack_emu.auth.errors import AuthConfigError
from dstack_emu.auth.policy import Policy
from dstack_emu.auth.simple import parse_policy
from dstack_emu.auth.spelling import unread_keys
from dstack_emu.inspection.policy_change import policy_diff


def check_policy(path: Path, text: str) -> dict[str, Any]:
    """Return `problem` (None if a webhook can use it), the `line` of malformed JSON, `warnings` and the `diff`.

    The diff is that of both policies as JSON in the usual form; a present file that is no JSON counts as empty.
    """
    found: dict[str, Any] = {"problem": None, "line": None, "warnings": [], "diff": ""}
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        return found | {"problem": f"not JSON: {error.msg} (column {error.colno})", "line": error.lineno}
    except RecursionError:
        return found | {"problem": "not JSON that anything reads: it is nested too deeply"}
    try:
        parse_policy(text.encode(), path.name)
    except AuthConfigError as error:
        found["problem"] = str(error)
    found["warnings"] = list(unread_keys(document, Policy))
    found["diff"] = policy_diff(path.name, _present(path), document)
    return found


def _present(path: Path) -> Any:
    try:
        return read_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
