"""The scripts of an app: run in a container that has the guest's sockets and `/dstack`, never by a shell of this host.

Source: dstack `dstack-prepare.sh` and `app-compose.sh` at 312dc605 and 40eaf35e (0.5.11): init scripts are sourced
after `set -e`, without the environment of the app; a pre-launch script is sourced with it, and what it exports goes on
to Compose; the main script of the `bash` runner is the standard input of a shell of its own.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from dstack_emu.deployment.container_engine import Engine, Output, passed_on
from dstack_emu.deployment.guest_compose import GuestFolders, GuestPort
from dstack_emu.simulator.errors import GuestError

_SHELL: Final = 'if command -v bash >/dev/null; then exec bash "$@"; else exec sh "$@"; fi'
_DUMP: Final = "env -0 >&3"
_IDLE: Final = 'trap "exit 0" TERM INT; while :; do sleep 3600 & wait $!; done'
"""What the container of a `bash` app does, so that what its script leaves in the background runs on."""
_SEPARATOR: Final = "\0==\0"
_SHELLS_OWN: Final = frozenset({"_", "SHLVL", "PWD", "OLDPWD"})


@dataclass(frozen=True, slots=True)
class ScriptRunner:
    """Runs the scripts of one machine in containers of an image."""

    engine: Engine
    image: str
    project: str
    labels: Mapping[str, str]
    folders: GuestFolders
    output: Output

    async def source(self, name: str, script: str, environment: Mapping[str, str], *, options: str) -> dict[str, str]:
        """Source a script with shell options such as `-e`; return the variables that it has exported or changed.

        Raises `GuestError` with the last lines if it fails, or ends its shell.
        """
        file = self.folders.write(f".{name}.sh", script)
        lines = ["exec 3>&1 1>&2", _DUMP, r"printf '\0==\0' >&3"]
        lines += [f"set {options}"] if options else []
        lines += [f". /dstack/{file.name}", _DUMP]
        container = f"{self.project}-{name}"
        try:
            await self._create(container, environment, "-c", _SHELL, "sh", "-c", "\n".join(lines))
            result = await self.engine.run("start", "--attach", container, output=self.output, has_secrets=True)
            await self.engine.run("rm", "--force", "--volumes", container)
        finally:
            file.unlink(missing_ok=True)
        result.succeeded(f"{name} failed with status {result.status}")
        before, _, after = result.stdout.partition(_SEPARATOR)
        if not after:
            raise GuestError(f"{name} ended its shell: nothing is started after it")
        return dict(_variables(after).items() - _variables(before).items())

    async def main(self, script: str, environment: Mapping[str, str], published: Mapping[GuestPort, int]) -> None:
        """Run the main script to its end, in a container that runs on; raise `GuestError` with its last lines."""
        name = f"{self.project}-app"
        ports = [
            word
            for (protocol, port), on_host in published.items()
            for word in ("--publish", f"127.0.0.1:{on_host}:{port}/{protocol}")
        ]
        await self._create(name, environment, "-c", _IDLE, options=("--init", *ports))
        started = await self.engine.run("start", name)
        started.succeeded("failed to start the main script")
        ended = await self.engine.run(
            "exec", "--interactive", name, "sh", "-c", _SHELL, text=script, output=self.output
        )
        ended.succeeded(f"main script failed with status {ended.status}")

    async def _create(
        self, name: str, environment: Mapping[str, str], *arguments: str, options: Sequence[str] = ()
    ) -> None:
        """Create a container whose command is `sh` with arguments; raise `GuestError`."""
        await self.engine.require_image(self.image)
        created = await self.engine.run(
            "create", "--name", name, *options, *self._options(environment),
            "--entrypoint", "sh", self.image, *arguments,
            variables=passed_on(environment),
            creates=True,
        )  # fmt: skip
        created.succeeded("docker create")

    def _options(self, environment: Mapping[str, str]) -> list[str]:
        """Return the options of `docker create` that give a container what a guest's own shell has."""
        run, home = self.folders.run, self.folders.home
        mounts = {run: "/var/run/dstack", run / "dstack.sock": "/var/run/dstack.sock", home: "/dstack"}
        mounts[run / "tappd.sock"] = "/var/run/tappd.sock"
        words = [f"--mount=type=bind,src={source},dst={target}" for source, target in mounts.items()]
        words += [f"--label={name}={value}" for name, value in self.labels.items()]
        words += [f"--env={name}" for name in passed_on(environment)]  # without values: they are in no command line
        return [*words, "--workdir=/dstack", "--add-host=host.docker.internal:host-gateway"]


def script_of(app_compose: str, name: str) -> str | None:
    """Return a script of an app-compose.json, None if it has none; raise `GuestError` if it is no text."""
    document: dict[str, Any] = json.loads(app_compose)
    if name not in document:
        return None
    if not isinstance(document[name], str):
        raise GuestError(f"app-compose.json: {name}: text expected, got {type(document[name]).__name__}")
    script: str = document[name]
    return script


def _variables(dump: str) -> dict[str, str]:
    """Read what `env -0` printed, without what the shell sets itself."""
    pairs = (entry.partition("=") for entry in dump.split("\0"))
    return {name: value for name, _, value in pairs if name and name not in _SHELLS_OWN}
