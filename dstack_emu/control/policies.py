"""The policies of a running stack, in a person's hands: a part of `control.api`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstack_emu.control.schemas import ControlError
from dstack_emu.deployment import policy_files
from dstack_emu.deployment.guests import RunningGuest

if TYPE_CHECKING:
    from dstack_emu.deployment.stack import Stack


class PolicyControl:
    """Who is allowed."""

    def __init__(self, stack: "Stack") -> None:
        self._stack = stack

    def policies(self) -> dict[str, str]:
        """The policy files, by KMS."""
        return {side: str(path) for side, path in self._stack.policies.items()}

    def policy(self, side: str) -> Any:
        """A policy as it is now."""
        try:
            return json.loads(self._policy_path(side).read_text())
        except (OSError, ValueError) as error:
            raise ControlError(f"the policy of {side} cannot be read: {error}", 409) from error

    def set_policy(self, side: str, policy: Mapping[str, Any]) -> None:
        """Put a policy in place; it is not checked, so that a webhook can be seen to refuse a wrong one."""
        path = self._policy_path(side)
        try:
            policy_files.write(path, dict(policy))
        except OSError as error:
            raise ControlError(f"{path} cannot be written: {error.strerror}", 409) from error

    def allow(self, side: str, guest: str, *, this_device_only: bool = False) -> dict[str, Any]:
        """Let a policy allow a trust domain as it is now, with its OS image."""
        return self._changed(side, policy_files.allowing, guest, this_device_only)

    def deny(self, side: str, guest: str) -> dict[str, Any]:
        """Let a policy no longer allow a trust domain."""
        return self._changed(side, policy_files.denying, guest, False)

    def _changed(self, side: str, change: Any, name: str, this_device_only: bool) -> dict[str, Any]:
        guest = self._known_guest(name)
        info = guest.agent.app_info()
        who = policy_files.Measured(
            is_kms=name.startswith("kms-"),
            app_id=info.app_id.hex(),
            compose_hash=info.compose_hash.hex(),
            mr_aggregated=info.mr_aggregated.hex(),
            os_image_hash=info.os_image_hash.hex(),
            device_id=info.device_id.hex() if this_device_only else None,
        )
        policy = self.policy(side)
        if not isinstance(policy, dict):
            raise ControlError(f"the policy of {side} is no object: set it first", 409)
        try:
            changed: dict[str, Any] = change(policy, who)
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise ControlError(f"the policy of {side} is none of auth-simple's: set it first", 409) from error
        self.set_policy(side, changed)
        return changed

    def _policy_path(self, side: str) -> Path:
        if side not in self._stack.policies:
            raise ControlError(f"there is no policy {side!r:.60}: {', '.join(self._stack.policies)}", 404)
        return self._stack.policies[side]

    def _known_guest(self, name: str) -> RunningGuest:
        guest = self._stack.guests.get(name)
        if guest is None:
            raise ControlError(f"there is no trust domain {name!r:.60}: {', '.join(self._stack.guests)}", 404)
        return guest
