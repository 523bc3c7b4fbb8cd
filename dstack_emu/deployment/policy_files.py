"""The policy files of a stack's auth-simple webhooks.

They are JSON and may be edited while the stack runs: auth-simple reads them at every request. A file is always replaced
atomically, so that no reader finds a part of one.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dstack_emu.deployment.errors import StackError
from dstack_emu.transport.files import replace_file

ANY_GATEWAY: Final = "any"
"""The gatewayAppId of a policy by which apps accept every gateway."""

DENY_ALL: Final[dict[str, Any]] = {
    "osImages": [],
    "gatewayAppId": ANY_GATEWAY,
    "kms": {"mrAggregated": [], "devices": [], "allowAnyDevice": True},
    "apps": {},
}
"""The runbook's placeholder: its empty list of measurements denies every KMS."""


@dataclass(frozen=True, slots=True)
class AppRule:
    """An app that a policy allows: its id and compose hash, as hex without 0x."""

    app_id: str
    compose_hash: str


def allow(
    os_images: list[str], mr_aggregated: list[str], apps: list[AppRule], gateway_app_id: str = ANY_GATEWAY
) -> dict[str, Any]:
    """Build a policy that allows these measurements (hex without 0x) on any device."""
    return {
        **DENY_ALL,
        "gatewayAppId": gateway_app_id,
        "osImages": sorted({f"0x{image}" for image in os_images}),
        "kms": {"mrAggregated": [f"0x{mr}" for mr in mr_aggregated], "devices": [], "allowAnyDevice": True},
        "apps": {
            f"0x{app.app_id}": {"composeHashes": [f"0x{app.compose_hash}"], "devices": [], "allowAnyDevice": True}
            for app in apps
        },
    }


def is_placeholder(path: Path) -> bool:
    """Return whether a policy file is still the placeholder that a stack has written."""
    try:
        policy: object = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return policy == DENY_ALL


def admit(
    paths: Iterable[Path],
    measured: Iterable[Mapping[str, Any]],
    apps: Mapping[AppRule, str],
    progress: Callable[[str], None],
    *,
    gateway_app_id: str = ANY_GATEWAY,
) -> None:
    """Write policies that allow KMS and apps into the files that are still the placeholder.

    `measured` are the answers of the KMS to GetAttestationInfo; `apps` has the OS image's hash (hex) of each app.
    `gateway_app_id` is their gatewayAppId.
    Raises `StackError`, and writes nothing, if a policy is of another stack.
    """
    infos, paths = list(measured), list(paths)
    if others := of_other_stacks(paths, infos, apps):
        raise StackError(others[0])
    policy = allow(
        [*(info["os_image_hash"] for info in infos), *apps.values()],
        [info["mr_aggregated"] for info in infos],
        list(apps),
        gateway_app_id,
    )
    for path in paths:
        if is_placeholder(path):
            write(path, policy)
        else:
            progress(f"keeping {path} as it is")


def of_other_stacks(
    paths: Iterable[Path], measured: Iterable[Mapping[str, Any]], apps: Mapping[AppRule, str]
) -> list[str]:
    """Describe each policy that was written for another stack: it lists measurements, but none of the present ones.

    `measured` and `apps` are as for `admit`; what is empty is not compared. A policy that cannot be read, or that lists
    nothing, is for the webhook to judge.
    """
    infos = list(measured)
    wanted = {
        "osImages": {*(info["os_image_hash"] for info in infos), *apps.values()},
        "kms.mrAggregated": {info["mr_aggregated"] for info in infos},
    }
    return [
        f"{path} was written for another seed, release or OS image: {member} lists {listed[0]:.80}, but not "
        f"{min(present)}, which is measured here. Delete the file, so that it is written anew, or use the seed, "
        "release and OS image of before"
        for path in paths
        for member, present in wanted.items()
        if (listed := _listed(path, member))
        and present
        and not any(_same(value, p) for value in listed for p in present)
    ]


def _listed(path: Path, member: str) -> list[str]:
    """Return the texts in a list of a policy, such as `kms.mrAggregated`; none if it has no such list."""
    try:
        found: object = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    for name in member.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return [value for value in found if isinstance(value, str)] if isinstance(found, list) else []


def place(paths: Iterable[Path]) -> None:
    """Write the placeholder into the files that do not exist yet, and create their folders."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write(path, DENY_ALL)


def write(path: Path, policy: dict[str, Any]) -> None:
    """Replace a policy."""
    replace(path, (json.dumps(policy, indent=2) + "\n").encode())


def replace(path: Path, content: bytes) -> None:
    """Replace the content of a policy file atomically; raise `OSError`."""
    # If this runs as root, in a container, the owner of the folder must be able to edit the policies in it.
    replace_file(path, content, like_folder=True)


PolicyContents = dict[str, bytes | None]
"""The content of each policy file, by KMS; None if there is no file."""


class PolicyFiles:
    """The policy files of a stack, in one folder, by the name of the KMS whose webhook reads them."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self.folder = folder
        self.paths = {name: self._path(name) for name in names}

    def _path(self, name: str) -> Path:
        return self.folder / f"auth-{name}.json"

    def add(self, name: str) -> Path:
        """Write a policy that denies everyone for another KMS, unless it has one."""
        path = self.paths[name] = self._path(name)
        place([path])
        return path

    def remove(self, name: str) -> None:
        """Delete the policy of a KMS, if there is one."""
        self.paths.pop(name, None)
        self._path(name).unlink(missing_ok=True)

    def capture(self) -> PolicyContents:
        """Return the content of every file."""
        return {name: _content(path) for name, path in self.paths.items()}

    def restore(self, state: PolicyContents) -> None:
        """Restore captured contents; raise `StackError`, which names a file that cannot be written."""
        for name, content in state.items():
            path = self.paths[name]
            try:
                if content is None:
                    path.unlink(missing_ok=True)
                elif _content(path) != content:
                    replace(path, content)
            except OSError as error:
                raise StackError(f"{path} cannot be written: {error.strerror}") from error


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


@dataclass(frozen=True, slots=True)
class MeasuredDomain:
    """A trust domain as a policy names it, in hex without 0x; `device_id` None allows any device."""

    is_kms: bool
    app_id: str
    compose_hash: str
    mr_aggregated: str
    os_image_hash: str
    device_id: str | None = None


def allowing(policy: dict[str, Any], measured: MeasuredDomain) -> dict[str, Any]:
    """Return a policy that allows one more trust domain, and all that this one allows."""
    images = _with(policy.get("osImages", []), measured.os_image_hash)
    if measured.is_kms:
        kms = dict(policy.get("kms", {}))
        kms["mrAggregated"] = _with(kms.get("mrAggregated", []), measured.mr_aggregated)
        return {**policy, "osImages": images, "kms": _on_device(kms, measured.device_id)}
    apps = dict(policy.get("apps", {}))
    app_id = next((key for key in apps if _same(key, measured.app_id)), f"0x{measured.app_id}")
    app = dict(apps.get(app_id, {}))
    app["composeHashes"] = _with(app.get("composeHashes", []), measured.compose_hash)
    return {**policy, "osImages": images, "apps": {**apps, app_id: _on_device(app, measured.device_id)}}


def denying(policy: dict[str, Any], measured: MeasuredDomain) -> dict[str, Any]:
    """Return a policy that allows one trust domain less: without a KMS's measurement, or an app's whole entry."""
    if measured.is_kms:
        kms = dict(policy.get("kms", {}))
        kms["mrAggregated"] = [mr for mr in kms.get("mrAggregated", []) if not _same(mr, measured.mr_aggregated)]
        return {**policy, "kms": kms}
    apps = {key: app for key, app in dict(policy.get("apps", {})).items() if not _same(key, measured.app_id)}
    return {**policy, "apps": apps}


def _with(values: list[str], value: str) -> list[str]:
    return values if any(_same(known, value) for known in values) else [*values, f"0x{value}"]


def _on_device(section: dict[str, Any], device_id: str | None) -> dict[str, Any]:
    if device_id is None:
        return {**section, "allowAnyDevice": True}
    return {**section, "devices": _with(section.get("devices", []), device_id), "allowAnyDevice": False}


def _same(text: str, value: str) -> bool:
    return text.lower().removeprefix("0x") == value
