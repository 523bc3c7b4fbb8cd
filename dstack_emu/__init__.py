"""dstack on a laptop: an emulator of a dstack deployment on Intel TDX. It protects nothing.

The public names are listed in docs/api.md; everything else may change with any release.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dstack_emu.deployment.config import StackConfig as StackConfig
    from dstack_emu.deployment.stack import Stack as Stack

__all__ = ["Stack", "StackConfig"]

_HOMES = {"Stack": "dstack_emu.deployment.stack", "StackConfig": "dstack_emu.deployment.config"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: the package itself costs nothing, as the pytest plugin needs."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
