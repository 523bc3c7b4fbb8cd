"""The compose file of a machine, changed so that it runs on the engine of this host and not in a guest.

It is changed after Compose has read it: `docker compose config --format json` gives one form for every way of writing.
Folders of the guest become folders of the machine; ports of the guest become free ports; names get the project's
prefix. What would give an app this host instead of its guest is refused (`host_access`).
"""

import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from dstack_emu.deployment.host_access import refuse_host_access, refuse_host_build
from dstack_emu.simulator.errors import GuestError

Document = dict[str, Any]
GuestPort = tuple[str, int]
"""A protocol, and a port at which the guest listens."""

_SOCKETS: Final = ("dstack.sock", "tappd.sock")
_ENGINE_SOCKETS: Final = ("/var/run/docker.sock", "/run/docker.sock")
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
        """Raise `GuestError` if a changed compose file uses what is outside, by a link that a script has made."""
        root = self.home.parent.resolve()
        for what, path in _used_paths(document):
            if not path.resolve().is_relative_to(root):
                raise GuestError(f"{what}: it is a link to a file of this host, which an app must not have")


@dataclass(frozen=True, slots=True)
class GuestProject:
    """A compose project: its name, its labels, and the ports of the guest that are mapped to the host.

    With `has_gateway` every TCP port that the file publishes is reached, not only those that are mapped.
    """

    name: str
    labels: Mapping[str, str]
    folders: GuestFolders
    mapped: frozenset[GuestPort]
    has_gateway: bool = False

    def is_reached(self, port: GuestPort) -> bool:
        """Return whether something outside the guest connects to a port that a service publishes."""
        return port in self.mapped or (self.has_gateway and port[0] == "tcp" and port[1] != 0)


@dataclass(frozen=True, slots=True)
class Adapted:
    """A changed compose file.

    `published` has the port of 127.0.0.1 for each port of the guest that is reached, `with_health_check` the services
    to wait for.
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
    refuse_host_access(document)
    for name, service in services.items():
        _drop_unset(service)
        _move_paths(name, service, project.folders)
        service["ports"] = list(_published(service.get("ports") or (), project, free_port, published))
        service["labels"] = {**(service.get("labels") or {}), **project.labels}
        if build := service.get("build"):
            _drop_unset(build)
            _move_build(build, project)
            refuse_host_build(name, build, project.folders.home.parent)
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


def _drop_unset(part: Document) -> None:
    """Drop what Compose has read already, and variables without a value, for which it would take those of this host."""
    for key in ("env_file", "label_file", "extends"):
        part.pop(key, None)
    for key in ("environment", "args"):
        if isinstance(part.get(key), dict):
            part[key] = {name: value for name, value in part[key].items() if value is not None}


def _used_paths(document: Document) -> Iterator[tuple[str, Path]]:
    """Yield each path on this host that a changed compose file uses, and what uses it."""
    for name, service in (document.get("services") or {}).items():
        for volume in service.get("volumes") or ():
            if volume.get("type") == "bind":
                yield f"service {name}: {volume['target']}", Path(volume["source"])
        build = service.get("build") or {}
        context = str(build.get("context", ""))
        if context.startswith("/"):
            yield f"service {name}: build", Path(context)
            yield f"service {name}: build: dockerfile", Path(context, build.get("dockerfile") or "Dockerfile")
        for other in (build.get("additional_contexts") or {}).values():
            if other.startswith("/"):
                yield f"service {name}: build: additional_contexts", Path(other)
    for kind in ("configs", "secrets"):
        for key, entry in (document.get(kind) or {}).items():
            if "file" in entry:
                yield f"{kind}: {key}", Path(entry["file"])


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
    contexts = build.get("additional_contexts") or {}
    for name, context in contexts.items():
        contexts[name] = project.folders.on_host(context) if context.startswith("/") else context
    build["labels"] = {**(build.get("labels") or {}), **project.labels}


def _published(
    ports: Iterable[Document],
    project: GuestProject,
    free_port: Callable[[str], int],
    published: dict[GuestPort, int],
) -> Iterator[Document]:
    """Yield the ports that are reached, on free ports; a port on the guest's loopback interface cannot be."""
    for port in ports:
        first = str(port.get("published") or "").partition("-")[0]
        guest = (port.get("protocol", "tcp"), int(first or 0))
        if project.is_reached(guest) and not str(port.get("host_ip", "")).startswith(_LOOPBACK):
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
            settings["name"] = f"{project.name}_{key}"
            settings["labels"] = {**(settings.get("labels") or {}), **project.labels}


def _has_health_check(service: Document) -> bool:
    check = service.get("healthcheck") or {}
    return bool(check.get("test")) and not check.get("disable") and check["test"][0] != "NONE"
