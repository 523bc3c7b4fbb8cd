"""Reads a docker-compose.yaml as far as services that run without containers need it.

Only services whose image is asked for are read in full, so that what other services use needs not be understood here.
Variables are replaced as docker compose does it, in values and after the YAML was parsed. Source: the compose
specification (compose-spec), chapters 5, 8 and 12.
"""

import itertools
import posixpath
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from dstack_emu.simulator.errors import GuestError
from dstack_emu.vmm.config import Protocol

MAX_SIZE: Final = 1024 * 1024
"""The maximum size of a compose file in bytes."""
MAX_VALUES: Final = 20_000
"""The maximum number of values in the parts that are read; aliases of YAML count each time."""
_NAME: Final = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,255}")
_VARIABLE: Final = re.compile(
    r"\$(?:(?P<dollar>\$)|(?P<plain>[A-Za-z_][A-Za-z0-9_]*)"
    r"|\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?:(?P<rule>:?[-?+])(?P<word>[^{}]*))?\}|(?P<wrong>))"
)


@dataclass(frozen=True, slots=True)
class Mount:
    """What a container has at `target`: a volume (`source` is its name) or a file or folder of the guest (its path)."""

    source: str
    target: str


@dataclass(frozen=True, slots=True)
class ComposeService:
    """One service. `ports` are those of the guest, by protocol and port, with the container's; `configs` are by target.

    `host_network` says that it has no network of its own, `restarts` that it is started again if it ends.
    """

    name: str
    image: str
    command: tuple[str, ...] = ()
    environment: Mapping[str, str] | None = None
    ports: Mapping[tuple[Protocol, int], int] | None = None
    mounts: tuple[Mount, ...] = ()
    configs: Mapping[str, str] | None = None
    host_network: bool = False
    restarts: bool = False


@dataclass(frozen=True, slots=True)
class ComposeFile:
    """A parsed file, and the variables of its `${…}`."""

    services: Mapping[str, Any]
    configs: Mapping[str, Any]
    variables: Mapping[str, str]

    @classmethod
    def parse(cls, text: str, variables: Mapping[str, str]) -> Self:
        """Parse the text of a file; raise `GuestError`."""
        if len(text.encode()) > MAX_SIZE:
            raise GuestError(f"docker-compose.yaml: at most {MAX_SIZE} bytes are read, got {len(text.encode())}")
        import yaml  # costs time and memory: imported only if a machine has services

        loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        try:
            document = yaml.load(text, loader)  # noqa: S506 - a safe loader, in C where there is one
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise GuestError(f"docker-compose.yaml is not YAML: {' '.join(str(error).split())}") from error
        root = _table(document, "docker-compose.yaml")
        services = _table(root.get("services"), "docker-compose.yaml: services")
        for name in services:
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise GuestError(f"docker-compose.yaml: services: a name expected, got {name!r:.100}")
        return cls(services, _table(root.get("configs"), "docker-compose.yaml: configs"), variables)

    def image(self, name: str) -> str:
        """Return the image of a service, empty if it is built; raise `GuestError`."""
        where = f"services.{name}"
        return self._text(self._service(name).get("image") or "", f"{where}.image")

    def command(self, name: str) -> tuple[str, ...]:
        """Return the words of a service's entrypoint and command; raise `GuestError`."""
        found = self._service(name)
        return tuple(
            word for key in ("entrypoint", "command") for word in self._words(found.get(key), f"services.{name}.{key}")
        )

    def service(self, name: str) -> ComposeService:
        """Read a service in full; raise `GuestError`."""
        where, found = f"services.{name}", self._service(name)
        _require_small(found, where)
        return ComposeService(
            name,
            self.image(name),
            self.command(name),
            self._environment(found.get("environment"), f"{where}.environment"),
            dict(self._ports(found.get("ports"), f"{where}.ports")),
            tuple(self._mounts(found.get("volumes"), f"{where}.volumes")),
            dict(self._configs(found.get("configs"), f"{where}.configs")),
            self._text(found.get("network_mode") or "", f"{where}.network_mode") == "host",
            self._text(found.get("restart") or "no", f"{where}.restart") != "no",
        )

    def _service(self, name: str) -> Mapping[str, Any]:
        return _table(self.services[name], f"services.{name}")

    # ---- members

    def _words(self, value: Any, where: str) -> Iterator[str]:
        if isinstance(value, list):
            yield from (self._text(word, where) for word in value)
        elif value is not None:
            try:
                yield from shlex.split(self._text(value, where))
            except ValueError as error:
                raise GuestError(f"{where}: {error}") from error

    def _environment(self, value: Any, where: str) -> dict[str, str]:
        """Read a table, or a list of NAME=VALUE; a name without value has that of the variable, if there is one."""
        if isinstance(value, list):
            pairs = [self._text(each, where).partition("=") for each in value]
            given = {name: text if equals else None for name, equals, text in pairs}
        else:
            table = _table(value, where)
            given = {str(name): None if each is None else self._text(each, where) for name, each in table.items()}
        found = {name: self.variables.get(name) if text is None else text for name, text in given.items()}
        return {name: text for name, text in found.items() if text is not None}

    def _ports(self, value: Any, where: str) -> Iterator[tuple[tuple[Protocol, int], int]]:
        for each in _list(value, where):
            if isinstance(each, dict):
                given = {
                    key: self._text(each[key], where) for key in ("published", "target", "protocol") if key in each
                }
                text, protocol = f"{given.get('published', '')}:{given.get('target')}", given.get("protocol", "tcp")
            else:
                text, _, protocol = self._text(each, where).partition("/")
            *_, published, target = ("", "", *text.rsplit(":", 2))
            if published == "":
                continue  # a random port of the guest, which nobody knows
            outside, inside = _port_range(published, where), _port_range(target, where)
            if len(outside) != len(inside) or protocol not in ("", "tcp", "udp"):
                raise GuestError(f"{where}: HOST:CONTAINER[/tcp|/udp] expected, got {each!r:.100}")
            kind: Protocol = "udp" if protocol == "udp" else "tcp"
            yield from (((kind, port), container) for port, container in zip(outside, inside, strict=True))

    def _mounts(self, value: Any, where: str) -> Iterator[Mount]:
        for each in _list(value, where):
            if isinstance(each, dict):
                source, target = (self._text(each.get(key) or "", where) for key in ("source", "target"))
            else:
                source, _, rest = self._text(each, where).partition(":")
                source, target = (source, rest.partition(":")[0]) if rest else ("", source)
            if not target.startswith("/"):
                raise GuestError(f"{where}: an absolute path of the container expected, got {each!r:.100}")
            if source.startswith((".", "~")):
                source = posixpath.join("/dstack", source)  # where the guest has its docker-compose.yaml
            elif source and not source.startswith("/") and not _NAME.fullmatch(source):
                raise GuestError(f"{where}: the name of a volume or a path expected, got {source!r:.100}")
            if source:  # else an anonymous volume, which is like the container's own folder
                yield Mount(source, target)

    def _configs(self, value: Any, where: str) -> Iterator[tuple[str, str]]:
        for each in _list(value, where):
            reference = _table(each, where) if isinstance(each, dict) else {"source": each}
            source = self._text(reference.get("source") or "", where)
            if source not in self.configs:
                raise GuestError(f"{where}: undefined config {source!r:.100}")
            definition = _table(self.configs[source], f"configs.{source}")
            if "content" not in definition:
                raise GuestError(f"configs.{source}: content expected; other kinds are not read without containers")
            target = self._text(reference.get("target") or f"/{source}", where)
            yield posixpath.join("/", target), self._text(definition["content"], f"configs.{source}.content")

    # ---- variables

    def _text(self, value: Any, where: str) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, int | float):
            return str(value)
        if not isinstance(value, str):
            raise GuestError(f"{where}: text expected, got {type(value).__name__}")
        return self._replaced(value, where)

    def _replaced(self, text: str, where: str) -> str:
        def value_of(match: re.Match[str]) -> str:
            if match["dollar"]:
                return "$"
            if match["wrong"] is not None:
                raise GuestError(f'{where}: invalid interpolation format: "{text[match.start() :]:.40}"')
            name, rule, word = match["plain"] or match["name"], match["rule"] or "", match["word"] or ""
            value = self.variables.get(name)
            is_set = bool(value) if rule.startswith(":") else value is not None
            if rule.endswith("+"):
                return self._replaced(word, where) if is_set else ""
            if rule.endswith("?") and not is_set:
                raise GuestError(f"{where}: required variable {name} is missing a value: {word}")
            return (value or "") if is_set or not rule else self._replaced(word, where)

        return _VARIABLE.sub(value_of, text)


def _table(value: Any, where: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise GuestError(f"{where}: a table expected, got {type(value).__name__}")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise GuestError(f"{where}: a list expected, got {type(value).__name__}")
    return value


def _port_range(text: str, where: str) -> range:
    first, _, last = text.partition("-")
    try:
        ports = range(int(first), int(last or first) + 1)
    except ValueError as error:
        raise GuestError(f"{where}: a port expected, got {text!r:.40}") from error
    if not ports or not 0 < ports[0] <= ports[-1] < 1 << 16:
        raise GuestError(f"{where}: a port from 1 to 65535 expected, got {text!r:.40}")
    return ports


def _require_small(value: Any, where: str) -> None:
    """Raise `GuestError` if a part has more values than are read."""
    left, pending = MAX_VALUES, [value]
    while pending:
        each = pending.pop()
        left -= 1
        if left < 0:
            raise GuestError(f"{where}: at most {MAX_VALUES} values are read")
        if isinstance(each, dict | list):
            pending += itertools.islice(each.values() if isinstance(each, dict) else each, left + 1)
