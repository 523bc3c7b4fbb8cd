"""The compose file of a machine, changed so that it runs on the engine of this host and not in a guest.

It is changed after Compose has read it: `docker compose config --format json` gives one form for every way of writing.
Folders of the guest become folders of the machine; ports of the guest become free ports; names get the project's
prefix. What would give an app this host instead of its guest is refused.
"""

import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from dstack_emu.simulator.errors import GuestError

Document = dict[str, Any]
GuestPort = tuple[str, int]
"""A protocol, and a port at which the guest listens."""

_SOCKETS: Final = ("dstack.sock", "tappd.sock")
_ENGINE_SOCKETS: Final = ("/var/run/docker.sock", "/run/docker.sock")
_HOST_MODES: Final = ("network_mode", "pid", "ipc", "uts", "userns_mode", "cgroup")
_LOOPBACK: Final = ("127.", "::1")


@dataclass(frozen=True, slots=True)
class GuestFolders:
    """The folders of one machine that take the place of its guest's file system.

    `run` has the sockets, `home` is `/dstack`, and `root` has every other path.
    """

    run: Path
    home: Path
    root: Path

    def on_host(self, path: str) -> str:
        """Return the path on this host of an absolute path in the guest.

        Relative paths of a compose file are below `home` here, or beside it, because Compose has resolved them.
        """
        inside = PurePosixPath("/" + posixpath.normpath(path).lstrip("/"))
        if inside.is_relative_to(self.home):
            return str(inside)
        if inside.is_relative_to(self.home.parent):
            inside = "/" / inside.relative_to(self.home.parent)
        run = PurePosixPath("/run", *inside.parts[3:]) if inside.is_relative_to("/var/run") else inside
        if run in (PurePosixPath("/run", name) for name in _SOCKETS):
            return str(self.run / run.name)
        if run.is_relative_to("/run/dstack"):
            return str(self.run / run.relative_to("/run/dstack"))
        if inside.is_relative_to("/dstack"):
            return str(self.home / inside.relative_to("/dstack"))
        return str(self.root / inside.relative_to("/"))

    def write(self, name: str, text: str) -> Path:
        """Write a new file of `/dstack` in the place of what is there, a link too; raise `GuestError`."""
        path = self.home / name
        try:
            path.unlink(missing_ok=True)
            with path.open("x") as file:
                file.write(text)
        except OSError as error:
            raise GuestError(f"/dstack/{name}: {error.strerror}") from error
        return path

    def require_inside(self, document: Document) -> None:
        """Raise `GuestError` if a changed compose file mounts what is outside, by a link that a script has made."""
        for name, service in (document.get("services") or {}).items():
            for volume in service.get("volumes") or ():
                if volume.get("type") != "bind":
                    continue
                if not Path(volume["source"]).resolve().is_relative_to(self.home.parent.resolve()):
                    raise GuestError(f"service {name}: {volume['target']}: its source is a link to a file of this host")


@dataclass(frozen=True, slots=True)
class GuestProject:
    """A compose project: its name, its labels, and the ports of the guest that are mapped to the host."""

    name: str
    labels: Mapping[str, str]
    folders: GuestFolders
    mapped: frozenset[GuestPort]


@dataclass(frozen=True, slots=True)
class Adapted:
    """A changed compose file.

    `published` has the port of 127.0.0.1 for each mapped port of the guest, `with_health_check` the services to wait
    for.
    """

    document: Document
    published: Mapping[GuestPort, int]
    with_health_check: tuple[str, ...]


def adapt(document: Document, project: GuestProject, free_port: Callable[[str], int]) -> Adapted:
    """Change what `docker compose config --format json` printed; raise `GuestError` about what is refused.

    `free_port` returns a free port of 127.0.0.1 for a protocol.
    """
    services: Mapping[str, Document] = document.get("services") or {}
    published: dict[GuestPort, int] = {}
    for name, service in services.items():
        _refuse_host(name, service)
        _move_paths(name, service, project.folders)
        service["ports"] = list(_published(service.get("ports") or (), project.mapped, free_port, published))
        service["labels"] = {**(service.get("labels") or {}), **project.labels}
        if build := service.get("build"):
            _move_build(build, project)
        _name_in_network(service)
        if service.get("network_mode") in (None, "bridge"):
            hosts = service.get("extra_hosts") or []
            service["extra_hosts"] = [*hosts, "host.docker.internal=host-gateway"]
    _rename(document, project)
    for kind in ("configs", "secrets"):
        for entry in (document.get(kind) or {}).values():
            if "file" in entry:
                entry["file"] = project.folders.on_host(entry["file"])
    checked = tuple(name for name, service in services.items() if _has_health_check(service))
    return Adapted(document, published, checked)


def _refuse_host(name: str, service: Document) -> None:
    refused = [f"{mode}: host" for mode in _HOST_MODES if service.get(mode) == "host"]
    refused += [each for each in ("privileged", "devices", "device_cgroup_rules", "cgroup_parent") if service.get(each)]
    for mode in ("network_mode", "pid", "ipc"):
        if str(service.get(mode) or "").startswith("container:"):
            refused.append(f"{mode}: {service[mode]}")
    refused += [f"volumes_from: {each}" for each in service.get("volumes_from") or () if each.startswith("container:")]
    if refused:
        raise GuestError(
            f"service {name}: {refused[0]}: in a guest this is about the guest, here it would be about this host; "
            "remove it to run the app here"
        )


def _move_paths(name: str, service: Document, folders: GuestFolders) -> None:
    for volume in service.get("volumes") or ():
        if volume.get("type") == "bind":
            if volume["source"] in _ENGINE_SOCKETS:
                raise GuestError(
                    f"service {name}: {volume['source']}: the engine of this host is not given to an app; "
                    "remove the mount to run the app here"
                )
            volume["source"] = folders.on_host(volume["source"])


def _move_build(build: Document, project: GuestProject) -> None:
    if str(build.get("context", "")).startswith("/"):
        build["context"] = project.folders.on_host(build["context"])
    build["labels"] = {**(build.get("labels") or {}), **project.labels}


def _published(
    ports: Iterable[Document],
    mapped: frozenset[GuestPort],
    free_port: Callable[[str], int],
    published: dict[GuestPort, int],
) -> Iterator[Document]:
    """Yield the ports that are mapped to the host, on free ports; a port on the guest's loopback cannot be mapped."""
    for port in ports:
        first = str(port.get("published") or "").partition("-")[0]
        guest = (port.get("protocol", "tcp"), int(first or 0))
        if guest in mapped and not str(port.get("host_ip", "")).startswith(_LOOPBACK):
            published[guest] = free_port(guest[0])
            yield {**port, "published": str(published[guest]), "host_ip": "127.0.0.1"}


def _name_in_network(service: Document) -> None:
    """Make a container's name an alias in its networks: two machines cannot have containers of one name."""
    name = service.pop("container_name", None)
    networks = service.get("networks")
    if name and isinstance(networks, dict):
        for key, settings in networks.items():
            settings = settings or {}
            networks[key] = {**settings, "aliases": [*(settings.get("aliases") or ()), name]}


def _rename(document: Document, project: GuestProject) -> None:
    """Give networks and volumes names and labels of the project."""
    for kind in ("networks", "volumes"):
        for key, settings in (document.get(kind) or {}).items():
            if settings.get("external"):
                raise GuestError(f"{kind}: {key}: external: a guest has none; remove `external` to run the app here")
            device = str((settings.get("driver_opts") or {}).get("device", ""))
            if settings.get("driver") == "host" or device.startswith("/"):
                raise GuestError(f"{kind}: {key}: it would be about this host; remove its driver to run the app here")
            settings["name"] = f"{project.name}_{key}"
            settings["labels"] = {**(settings.get("labels") or {}), **project.labels}


def _has_health_check(service: Document) -> bool:
    check = service.get("healthcheck") or {}
    return bool(check.get("test")) and not check.get("disable") and check["test"][0] != "NONE"
