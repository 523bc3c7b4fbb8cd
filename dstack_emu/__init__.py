"""dstack on a laptop: an emulator of a dstack deployment on Intel TDX. It protects nothing.

The public names are listed in docs/api.md; everything else may change with any release.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dstack_emu.control.schemas import ControlError as ControlError
    from dstack_emu.deployment.config import StackConfig as StackConfig
    from dstack_emu.deployment.errors import PartEndedError as PartEndedError
    from dstack_emu.deployment.errors import StackError as StackError
    from dstack_emu.stack import Stack as Stack

__all__ = ["ControlError", "PartEndedError", "Stack", "StackConfig", "StackError"]

_MODULES = {
    "ControlError": "dstack_emu.control.schemas",
    "PartEndedError": "dstack_emu.deployment.errors",
    "Stack": "dstack_emu.stack",
    "StackConfig": "dstack_emu.deployment.config",
    "StackError": "dstack_emu.deployment.errors",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: every pytest run imports this package, which must be fast."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)
