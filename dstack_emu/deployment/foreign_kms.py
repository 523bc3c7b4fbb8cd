"""A KMS of a stack that is another program, in a trust domain of the stack.

Its agent and its PCCS are the stack's, and so is its webhook unless another one is named. The journal has what it asks
of them. What happens inside it, and its keys, are its own: no snapshot contains them.
"""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Final
from urllib.parse import urlsplit

from dstack_emu.deployment.authorization import TIMEOUT, Phase, tls_url
from dstack_emu.deployment.context import StackContext
from dstack_emu.deployment.errors import StackError
from dstack_emu.deployment.guests import RunningGuest
from dstack_emu.deployment.kms_process import KmsFiles, KmsProcess
from dstack_emu.deployment.running_kms import RunningKms
from dstack_emu.deployment.specs import KmsSpec
from dstack_emu.deployment.state import KmsState
from dstack_emu.kms_emu.api_auth import ONBOARD_VARIABLES
from dstack_emu.kms_emu.cert_dir import ROOT_CA_CERT
from dstack_emu.simulator.seed import Seed
from dstack_emu.transport.client import MAX_RESPONSE
from dstack_emu.transport.failures import AnswerTooLongError, NoAnswerError
from dstack_emu.transport.http_client import HttpClient
from dstack_emu.transport.listen import reachable
from dstack_emu.transport.localhost_socket import bound_host
from dstack_emu.transport.tls import client_context
from dstack_emu.transport.urls import is_ip_address

EXTERNAL: Final = "external"
"""In the place of a command: somebody else starts the program, at the address that its kms.toml names."""

COMMAND_PATIENCE, EXTERNAL_PATIENCE = 60.0, 600.0
"""Seconds until a program has to answer: one that a command starts, and one that somebody starts by hand."""

NO_ANSWER: Final = "no answer"
"""The phase of a KMS that does not answer."""


def is_url(program: str) -> bool:
    """Return whether a setting names the URL of a KMS that somebody else starts, and not a command."""
    return program.startswith(("http://", "https://"))


class ForeignKms(RunningKms):
    """Another program as a KMS of a stack. `program` is its command line, its URL, or `external`."""

    def __init__(
        self, context: StackContext, spec: KmsSpec, guest: RunningGuest, program: str, progress: Callable[[str], None]
    ) -> None:
        super().__init__(context, spec, guest)
        self._configured, self._progress = program, progress
        self._phase: str = NO_ANSWER
        self._root = ""

    @property
    def phase(self) -> str:
        """Its phase when it was last asked."""
        return self._phase

    @property
    def has_judged_itself(self) -> bool:
        """Whether it has keys: then a KMS has verified its own evidence, as upstream's does, once in its life."""
        return self._phase == "runtime"

    @property
    def domain(self) -> str:
        """The host in its URL, which the stack itself uses, unless that is an IPv6 address.

        A KMS of upstream's takes no IPv6 address as its domain, and has one name only.
        """
        host = urlsplit(self.url).hostname or ""
        return super().domain if ":" in host or not host else host

    # ---- starting and stopping

    async def start(self, entropy_seed: Seed) -> None:
        """Write its kms.toml and run its command, if it has one; raise `StackError` if that cannot be done."""
        context, program, service = self._context, self._configured, self.spec.service
        webhook, _ = await self._webhook()
        url, host, port = self._address()
        for suffix in ("grpc", "grpc-mtls") if context.config.grpc else ():
            context.ports.take(f"{service}-{suffix}").close()  # it has no gRPC: a client shall be refused there
        is_command = program != EXTERNAL and not is_url(program)
        self._program = KmsProcess(
            service,
            self._settings(webhook, host, port),
            KmsFiles.in_folder(self.guest.folder),
            url=url,
            agent=f"unix:{self.guest.dstack_sock}",
            command=program if is_command else None,
            patience=context.config.kms_wait or (COMMAND_PATIENCE if is_command else EXTERNAL_PATIENCE),
            progress=self._progress,
        )
        self._exit.push_async_callback(self._program.stop)
        context.urls[service] = url
        await self._program.start()

    def _address(self) -> tuple[str, str, int]:
        """Return the URL at which it answers, and the address at which it listens; leave that to it."""
        with self._context.ports.take(self.spec.service) as sock:
            if not is_url(self._configured):
                return f"http://{reachable(sock)}", bound_host(sock), sock.getsockname()[1]
        parts = urlsplit(self._configured)
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        return self._configured.rstrip("/"), host if is_ip_address(host) else "0.0.0.0", port  # noqa: S104 - a name's own

    async def ready(self) -> None:
        """Wait until it answers; raise `StackError` if it ends or does not answer in time."""
        await self._entered(await self._program.answers())

    async def ended(self) -> None:
        """Wait until the program ends; raise `StackError`."""
        await self._program.ended()

    async def restart(self) -> None:
        """Run its command again; raise `StackError` if somebody else runs it, or if it does not start."""
        await self._entered(await self._program.restart())

    @property
    def files(self) -> dict[str, str]:
        """The files that it reads and writes, and its agent's address, for the user who starts it."""
        program = self._program
        files = {"config": str(program.files.config), "agent": program.agent}
        return files | ({"log": str(program.files.log)} if program.is_run_here else {})

    def printed(self) -> list[str]:
        """Return the lines that it has printed, if it was started here."""
        try:
            return self._program.files.log.read_text(errors="backslashreplace").splitlines()
        except FileNotFoundError:
            return []

    @property
    def _token(self) -> str:
        """The token that its onboard phase demands: that of kms.toml, or of the variable that it has, too."""
        variables = (os.environ.get(name, "").strip() for name in ONBOARD_VARIABLES)
        return super()._token or next(filter(None, variables), "")

    # ---- its phase

    async def current(self) -> Phase:
        """Return its phase; raise `StackError` if it does not answer."""
        phase = await self._program.phase()
        if phase != self._phase:
            await self._entered(phase)
        return phase

    async def reached_runtime(self) -> None:
        """Wait until it answers over TLS; raise `StackError` if it does not."""
        await self._program.reached_runtime()
        await self._entered("runtime")

    async def refresh(self) -> None:
        """Ask it for its phase."""
        try:
            await self.current()
        except StackError:
            self._phase = NO_ANSWER

    async def _entered(self, phase: Phase) -> None:
        """Publish its URL, whose scheme depends on its phase, and note the root of its keys."""
        self._phase = phase
        is_runtime = phase == "runtime"
        self._context.urls[self.spec.service] = self._program.url_of(phase)
        self._root = await self._read_root() if is_runtime else ""

    async def _read_root(self) -> str:
        """Return the root certificate (PEM) of its keys: that in its folder or, if it has another one, in GetMeta.

        It is empty if the KMS states none, such as one whose webhook does not answer.
        """
        path = self.cert_dir / ROOT_CA_CERT
        with suppress(OSError):
            return path.read_text()
        # The certificate of the connection is not verified: this is how its root becomes known.
        client = HttpClient(timeout=TIMEOUT, max_answer=MAX_RESPONSE, tls=client_context())
        try:
            answer = await client.send("POST", f"{tls_url(self._program.url)}/prpc/KMS.GetMeta?json", b"{}")
            root = str(json.loads(answer.body)["ca_cert"])
        except (NoAnswerError, AnswerTooLongError, ValueError, KeyError, TypeError):
            return ""
        finally:
            await client.close()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(root)
        return root

    # ---- state

    def capture(self) -> KmsState:
        """Return the present state, without keys; raise `StackError` if it does not answer."""
        if self._phase == NO_ANSWER:
            raise StackError(f"{self.spec.service} at {self.url} does not answer")
        return KmsState.model_construct(
            spec=self.spec,
            phase=self._phase,
            files={},
            own_boot_info=None,
            requests=0,
            failures=0,
            measured=self.measured,
            foreign_root=self._root,
        )

    async def require_restorable(self, state: KmsState) -> None:
        """Raise `StackError` unless it has the phase and the keys of the state, which only the program itself has."""
        about = f"{self.spec.service} is another program, whose keys are in no snapshot"
        if state.foreign_root is None:
            raise StackError(f"{about}, and the state is of a KMS of the emulator: start the stack without --kms")
        phase = await self.current()
        if phase != state.phase:
            raise StackError(f"{about}: it is in its {phase} phase, and was in its {state.phase} phase then")
        if self._root != state.foreign_root:
            raise StackError(f"{about}: it has other keys than then")

    async def restore(self, state: KmsState) -> None:
        """Restore what the stack knows of it."""
        self.measured = state.measured
