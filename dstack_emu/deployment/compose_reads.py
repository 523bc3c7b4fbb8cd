"""The files that Compose reads while it reads a compose file: here only those of the machine's own folder.

`env_file`, `label_file`, `extends` and `include` name files that Compose reads on this host, not in a container. They
may be anywhere in a compose file, behind aliases and merges, and in every file that `extends` or `include` names; so
each mapping with such a key is looked at, wherever it is. What this reader understands otherwise than Compose could
hide a path, and is refused. Source: the compose specification (compose-spec), and compose-go 2.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from dstack_emu.deployment.compose_file import MAX_SIZE
from dstack_emu.simulator.errors import GuestError

MAX_FILES: Final = 100
"""The maximum number of compose files that one of them includes or extends."""
_NAMES_FILES: Final = ("env_file", "label_file", "extends", "include")
_NAMES_COMPOSE_FILES: Final = ("extends", "include")
_REMOTE: Final = re.compile(r".*(://|@)|github\.com/|oci:")
_BINARY: Final = "tag:yaml.org,2002:binary"


def require_own_files(file: Path, home: Path) -> None:
    """Raise `GuestError` if Compose would read a file outside of `home` for a compose file, which is in it."""
    require_own(file, home, "docker_compose_file")
    pending, seen = [file], set[Path]()
    while pending:
        each = pending.pop()
        if each in seen:
            continue
        seen.add(each)
        if len(seen) > MAX_FILES:
            raise GuestError(f"docker_compose_file: at most {MAX_FILES} compose files are read")
        for key, name in _named_files(each, home):
            found = _own_file(key, name, each.parent, home)
            if key in _NAMES_COMPOSE_FILES and found.is_file():
                pending.append(found)


def require_own(path: Path, home: Path, what: str) -> None:
    """Raise `GuestError` if a path leads out of `home`, by a link that a script has made."""
    if not path.resolve().is_relative_to(home.resolve()):
        raise GuestError(f"{what}: it is a link to a file of this host, which an app must not read")


def _own_file(key: str, name: str, folder: Path, home: Path) -> Path:
    parts = posixpath.normpath(name).split("/")
    if name.startswith(("/", "~")) or ".." in parts or "$" in name or _REMOTE.match(name):
        raise GuestError(
            f"docker_compose_file: {key}: {name:.200}: Compose would read it on this host; "
            "a relative path of a file below /dstack is expected, without variables"
        )
    require_own(folder / name, home, f"docker_compose_file: {key}: {name:.200}")
    return folder / name


def _named_files(file: Path, home: Path) -> Iterator[tuple[str, str]]:
    """Yield each text below a key that names files, with the key."""
    what = "docker_compose_file" if file.name == "docker-compose.yaml" else f"/dstack/{file.relative_to(home)}"
    seen = set[int]()
    pending = list(_documents(file, what))
    while pending:
        node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        _refuse_binary(node, what)
        if isinstance(node.value, str):
            continue
        for each in node.value:
            key, value = each if isinstance(each, tuple) else (None, each)
            pending += [value] if key is None else [key, value]
            if key is not None and key.value in _NAMES_FILES:
                yield from ((key.value, text) for text in _texts(value, what))


def _texts(node: Any, what: str) -> Iterator[str]:
    seen = set[int]()
    pending = [node]
    while pending:
        each = pending.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        _refuse_binary(each, what)
        if isinstance(each.value, str):
            yield each.value
        else:
            pending += [part for item in each.value for part in (item if isinstance(item, tuple) else (item,))]


def _refuse_binary(node: Any, what: str) -> None:
    if node.tag == _BINARY:
        raise GuestError(f"{what}: !!binary is not read here")


def _documents(file: Path, what: str) -> Iterator[Any]:
    """Yield the nodes of the documents of a file; raise `GuestError` if it cannot be read."""
    import yaml  # costs time and memory: imported only if a machine has services

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        content = file.read_bytes()
        if len(content) > MAX_SIZE:
            raise GuestError(f"{what}: at most {MAX_SIZE} bytes are read, got {len(content)}")
        yield from (node for node in yaml.compose_all(content.decode(), Loader=loader) if node is not None)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise GuestError(f"{what}: {' '.join(str(error).split())}") from error
