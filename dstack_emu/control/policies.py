"""The calls of the control API that read and change the policies of a running stack."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dstack_emu.control.schemas import ControlError, PolicyChange, unknown
from dstack_emu.deployment import policy_files
from dstack_emu.deployment.deployment import Deployment
from dstack_emu.deployment.errors import StackError
from dstack_emu.deployment.guests import RunningGuest
from dstack_emu.transport.urls import shown_url

if TYPE_CHECKING:
    from dstack_emu.deployment.stack_chain import StackChain

T = TypeVar("T")

Change = Callable[[dict[str, Any], policy_files.MeasuredDomain], dict[str, Any]]
"""Returns a policy that allows one trust domain more, or one less."""


def policy_on_chain(service: str, contract: str) -> str:
    """Say why there is no policy file of a KMS that the contracts of the stack's chain decide for."""
    return (
        f"{service} is decided for by the contract {contract} on the stack's chain, not by a file: change what it "
        "allows by transactions (ctl policy allow and deny send them)"
    )


def foreign_policy(service: str, webhook: str) -> str:
    """Say why the stack has no policy for a KMS that asks a webhook of somebody's own."""
    return f"{service} asks the webhook {shown_url(webhook)}: change its policy there, the stack has none for it"


def _sent(work: Callable[[], T]) -> T:
    """Return what a call of the stack's chain returns; raise `ControlError` if a contract refuses."""
    try:
        return work()
    except StackError as error:
        raise ControlError(str(error), 409) from error


class PolicyControl:
    """The calls about policies; `kms` is the name of the KMS whose webhook uses the policy."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment

    def policies(self) -> dict[str, str]:
        """Return the path of each policy file, by KMS."""
        return {name: str(path) for name, path in self._deployment.policies.items()}

    def check_policy(self, kms: str, text: str) -> dict[str, Any]:
        """Say what a webhook would find wrong with a policy's text, which keys nothing reads, and what would change."""
        from dstack_emu.control.policy_check import check_policy  # imported here, because few stacks need it

        return check_policy(self._policy_path(kms), text)

    def policy(self, kms: str) -> Any:
        """Return a policy's present content; of contracts on the stack's chain what they allow, in the same form."""
        if (chain := self._chain_of(kms)) is not None:
            return _sent(chain.policy)
        try:
            return json.loads(self._policy_path(kms).read_text())
        except (OSError, ValueError) as error:
            raise ControlError(f"the policy of {kms} cannot be read: {error}", 409) from error

    def set_policy(self, kms: str, policy: Mapping[str, Any]) -> None:
        """Replace a policy. It is not validated, so that a test can give a webhook an invalid one.

        On the stack's chain the transactions are sent after which the contracts allow the same; they are for both KMS.
        """
        if (chain := self._chain_of(kms)) is not None:
            _sent(lambda: chain.set_policy(policy, self._kms_devices()))
            return
        path = self._policy_path(kms)
        try:
            policy_files.write(path, dict(policy))
        except OSError as error:
            raise ControlError(f"{path} cannot be written: {error.strerror}", 409) from error

    def allow(self, kms: str, guest: str, *, this_device_only: bool = False) -> dict[str, Any]:
        """Allow a trust domain by its present measurements and its OS image; return the new policy."""
        return self._changed(kms, policy_files.allowing, self._measured(guest, this_device_only))

    def deny(self, kms: str, guest: str) -> dict[str, Any]:
        """Stop allowing a trust domain; return the new policy."""
        return self._changed(kms, policy_files.denying, self._measured(guest, False))

    def change_policy(self, kms: str, change: PolicyChange, *, is_allowed: bool) -> dict[str, Any]:
        """Allow or deny what a request names; return the new policy."""
        if change.guest is not None:
            measured = self._measured(change.guest, change.this_device_only)
        elif is_allowed and change.app_id is not None and change.compose_hash is None:
            raise ControlError("an app is allowed with its app-compose: compose_hash expected beside app_id")
        else:
            measured = policy_files.MeasuredDomain(
                is_kms=change.mr_aggregated is not None,
                app_id=change.app_id or "",
                compose_hash=change.compose_hash or "",
                mr_aggregated=change.mr_aggregated or "",
                os_image_hash=change.os_image_hash or self._deployment.context.image.os_image_hash.hex(),
            )
        return self._changed(kms, policy_files.allowing if is_allowed else policy_files.denying, measured)

    def _measured(self, name: str, this_device_only: bool) -> policy_files.MeasuredDomain:
        info = self._known_guest(name).agent.app_info()
        return policy_files.MeasuredDomain(
            is_kms=name.startswith("kms-"),
            app_id=info.app_id.hex(),
            compose_hash=info.compose_hash.hex(),
            mr_aggregated=info.mr_aggregated.hex(),
            os_image_hash=info.os_image_hash.hex(),
            device_id=info.device_id.hex() if this_device_only else None,
        )

    def _chain_of(self, kms: str) -> "StackChain | None":
        return self._deployment.context.chain_of(kms)

    def _kms_devices(self) -> set[bytes]:
        """Return the devices of all KMS: contracts cannot allow any device of a KMS."""
        return {kms.guest.agent.app_info().device_id for kms in self._deployment.kms.values()}

    def _changed(self, kms: str, change: Change, measured: policy_files.MeasuredDomain) -> dict[str, Any]:
        policy = self.policy(kms)
        if not isinstance(policy, dict):
            raise ControlError(f"the policy of {kms} is not a JSON object: replace it (ctl policy set) first", 409)
        try:
            changed = change(policy, measured)
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise ControlError(
                f"the policy of {kms} does not have auth-simple's format: replace it (ctl policy set) first", 409
            ) from error
        self.set_policy(kms, changed)
        return changed if self._chain_of(kms) is None else self.policy(kms)

    def _policy_path(self, kms: str) -> Path:
        running = self._deployment.kms.get(kms)
        if running is not None and running.spec.asks_foreign_webhook:
            raise ControlError(foreign_policy(running.spec.service, running.spec.webhook), 409)
        if (chain := self._chain_of(kms)) is not None:
            raise ControlError(policy_on_chain(f"kms-{kms}", chain.kms_address), 409)
        if kms not in self._deployment.policies:
            raise unknown("policy", kms, self._deployment.policies)
        return self._deployment.policies[kms]

    def _known_guest(self, name: str) -> RunningGuest:
        guest = self._deployment.guests.get(name)
        if guest is None:
            raise unknown("trust domain", name, self._deployment.guests)
        return guest
