"""What a compose file must not have here, because it would be about this host and not about a guest.

A guest has an engine of its own; here apps share the one of this host. Source of the members: the compose
specification (compose-spec), and the reference of Docker Compose.
"""

import posixpath
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from dstack_emu.deployment.container_engine import is_passed_on
from dstack_emu.simulator.errors import GuestError

Document = Mapping[str, Any]
_HOST_MODES: Final = ("network_mode", "pid", "ipc", "uts", "userns_mode", "cgroup")
_OWN_NETWORKS: Final = re.compile(r"none|bridge|service:.*|")
_REFUSED_MEMBERS: Final = (
    "privileged", "devices", "device_cgroup_rules", "cgroup_parent", "use_api_socket", "provider", "models",
    "credential_spec",
)  # fmt: skip
_CAPABILITIES: Final = frozenset({"ALL", "SYS_ADMIN", "SYS_MODULE", "SYS_RAWIO", "DAC_READ_SEARCH"})
"""Capabilities with which a container can read this host's files."""
_SECCOMP: Final = re.compile(r"seccomp[:=](?!unconfined$|builtin$).*")
_DRIVERS: Final = {"networks": (None, "", "default", "bridge"), "volumes": (None, "", "default", "local")}
_LOCAL_CACHE: Final = re.compile(r"(^|,)type=local(,|$)")
_REFUSED_IN_BUILD: Final = ("ssh", "privileged", "entitlements")
_BUILD_NETWORKS: Final = (None, "", "default", "none")


def refuse_host_access(document: Document) -> None:
    """Raise `GuestError` about the first member that would give an app this host."""
    for name, service in (document.get("services") or {}).items():
        for member in _of_service(service):
            raise GuestError(
                f"service {name}: {member}: in a guest this is about the guest, here it would be about this host; "
                "remove it to run the app here"
            )
    parts: Mapping[str, Callable[[str, Document], str]] = {
        "networks": _of_driven, "volumes": _of_driven, "configs": _of_file, "secrets": _of_file,
    }  # fmt: skip
    for kind, refused in parts.items():
        for key, settings in (document.get(kind) or {}).items():
            if member := refused(kind, settings or {}):
                raise GuestError(f"{kind}: {key}: {member}: it would be about this host; remove it to run the app here")
    if document.get("models"):
        raise GuestError("models: they would be run on this host; remove them to run the app here")


def refuse_host_build(name: str, build: Document, folder: Path) -> None:
    """Raise `GuestError` if the build of a service would use this host; its paths are those on this host."""
    for member in _of_build(build, folder):
        raise GuestError(f"service {name}: build: {member}: it would be about this host; remove it to run the app here")


def _of_build(build: Document, folder: Path) -> Iterator[str]:
    """Yield the members of a build that would use this host."""
    yield from (each for each in _REFUSED_IN_BUILD if build.get(each))
    if build.get("network") not in _BUILD_NETWORKS:
        yield f"network: {build['network']}"
    for key in ("cache_from", "cache_to"):
        yield from (f"{key}: {each}" for each in build.get(key) or () if _LOCAL_CACHE.search(each))
    contexts = (build.get("additional_contexts") or {}).values()
    yield from (f"additional_contexts: {each}" for each in contexts if each.startswith("oci-layout:"))
    context, file = str(build.get("context", "")), build.get("dockerfile") or ""
    is_inside = Path(posixpath.normpath(posixpath.join(context, file))).is_relative_to(folder)
    if context.startswith("/") and not is_inside:
        yield f"dockerfile: {file}"


def _of_service(service: Document) -> Iterator[str]:
    """Yield the members of a service that would be about this host."""
    for mode in _HOST_MODES:
        value = str(service.get(mode) or "")
        is_foreign = value == "host" or value.startswith("container:")
        if is_foreign or (mode == "network_mode" and not _OWN_NETWORKS.fullmatch(value)):
            yield f"{mode}: {value}"
    yield from (each for each in _REFUSED_MEMBERS if service.get(each))
    yield from (f"volumes_from: {each}" for each in service.get("volumes_from") or () if each.startswith("container:"))
    for capability in service.get("cap_add") or ():
        if capability.upper().removeprefix("CAP_") in _CAPABILITIES:
            yield f"cap_add: {capability}"
    yield from (f"security_opt: {each}" for each in service.get("security_opt") or () if _SECCOMP.fullmatch(each))
    for hook in ("post_start", "pre_stop"):
        if any(each.get("privileged") for each in service.get(hook) or ()):
            yield f"{hook}: privileged"


def _of_driven(kind: str, settings: Document) -> str:
    """Return what a network or a volume would use of this host, empty for nothing."""
    if settings.get("external"):
        return "external"
    if settings.get("driver") not in _DRIVERS[kind]:
        return f"driver: {settings['driver']}"
    options = settings.get("driver_opts") or {}
    is_memory = options.get("type") == "tmpfs"
    return f"device: {options['device']}" if options.get("device") and not is_memory else ""


def _of_file(_kind: str, settings: Document) -> str:
    """Return what a config or a secret would use of this host, empty for nothing."""
    if settings.get("external"):
        return "external"
    name = settings.get("environment")
    return f"environment: {name}" if name and not is_passed_on(name) else ""
