"""A running stack in a test's hands: its parts by name, found where they are and made where they are not."""

import json
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import aiohttp

from dstack_emu.deployment.config import StackConfig
from dstack_emu.deployment.stack import Stack
from dstack_emu.simulator.image import OsImage
from dstack_emu.testing.kms import LiveKms, LivePolicy
from dstack_emu.testing.observation import LiveClock, LiveFault, LiveJournal
from dstack_emu.testing.refusals import Refused
from dstack_emu.testing.thread import StackThread, SyncControl
from dstack_emu.testing.trust_domain import LiveImage, LivePlatform, LiveTrustDomain, LiveVendor
from dstack_emu.transport.tls import client_context
from dstack_emu.webhook_check.check import Report, check_webhook
from dstack_emu.webhook_check.questions import Questions

T = TypeVar("T")

TIMEOUT: Final = 90.0
"""Seconds that an answer may take: longer than services wait for one another."""


class LiveStack:
    """A stack in a thread of its own, on free ports; `settings` are fields of `StackConfig`.

    Use it as a context manager. `control` has every call of docs/control.md, without `await`; the other attributes
    are the same in a test's words. It may be used from any thread.
    """

    def __init__(self, **settings: Any) -> None:
        self._thread = StackThread(StackConfig.on_free_ports(**settings))
        self.journal, self.clock, self.vendor = LiveJournal(self), LiveClock(self), LiveVendor(self)

    def __enter__(self) -> Self:
        self._stack = self._thread.start()
        self.control = SyncControl(self._thread, self._stack.control)
        self.journal.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.stop()

    # ---- what there is

    @property
    def description(self) -> dict[str, Any]:
        """What `dstack-emu up --json` prints of it."""
        return self.in_thread(lambda stack: stack.description())

    @property
    def services(self) -> dict[str, str]:
        """The URL of each service."""
        return self.in_thread(lambda stack: dict(stack.services))

    @property
    def pccs_url(self) -> str:
        """Where collateral is."""
        return self.services["pccs"]

    @property
    def root_ca(self) -> Path:
        """The emulated Intel's root certificate (PEM)."""
        return self.in_thread(lambda stack: stack.root_ca)

    # ---- its parts: found by name, or made

    def app(self, name: str | None = None, **spec: Any) -> LiveTrustDomain:
        """The app of that name; with anything else given, a new one (fields of `trust_domain`).

        Without a name it is the stack's own, or a new one is called `app-2`, `app-3`, …
        """
        if name is None:
            name = "app" if not spec else self._free_name("app")
        return self.trust_domain(name, **spec)

    def trust_domain(self, name: str, **spec: Any) -> LiveTrustDomain:
        """The trust domain of that name, or a new one, powered on and without keys.

        `spec` has the fields of docs/control.md; `compose` may be a dict, `platform` a `LivePlatform`, `image` a
        `LiveImage`.
        """
        if spec or name not in self.in_thread(lambda stack: dict(stack.guests)):
            self.control.add_guest(name, **_plain(spec))
        return LiveTrustDomain(self, name)

    def kms(self, name: str = "src", **spec: Any) -> LiveKms:
        """The KMS of that name, or a new one without keys (fields of docs/control.md)."""
        if spec or name not in self.in_thread(lambda stack: dict(stack.kms_parts)):
            self.control.add_kms(name, **_plain(spec))
        return LiveKms(self, name)

    def platform(self, name: str | None = None, **state: Any) -> LivePlatform:
        """The machine of that name, made where there is none, with a state where one is given.

        Without a name it is a new one: `machine-1`, `machine-2`, …
        """
        platform = LivePlatform(self, self._free_name("machine", 1) if name is None else name)
        self.control.add_platform(platform.name)
        return platform.set(**state) if state else platform

    def image(self, name: str | None = None, version: str = "0.5.11") -> LiveImage:
        """An OS image; without a name the one that everything boots that names none."""

        def made(stack: Stack) -> LiveImage:
            image = stack.image if name is None else OsImage.from_seed(stack.seed.derive, name, version)
            return LiveImage(name, version, image.os_image_hash.hex())

        return self.in_thread(made)

    def policy(self, kms: LiveKms | str = "src") -> LivePolicy:
        """The policy of a KMS's webhook."""
        return (self.kms(kms) if isinstance(kms, str) else kms).policy

    # ---- what is done to it

    def boot(self, app: LiveTrustDomain | str | None = None, kms: LiveKms | str = "src") -> LiveTrustDomain:
        """Let an app (the stack's own) fetch keys from a KMS; raise `Refused` with the KMS's words."""
        return (self.app(app) if app is None or isinstance(app, str) else app).boot(kms)

    def fault(self, **fields: Any) -> LiveFault:
        """Put a fault in force (fields of docs/control.md): for a `with` block, or until the test ends."""
        return LiveFault(self, self.in_thread(lambda stack: stack.control.add_fault(**fields)))

    def check_webhook(self, url: str) -> Report:
        """Ask somebody's webhook everything that this stack's KMS would (`dstack-emu check-webhook`)."""
        questions = Questions.of_seed(self.in_thread(lambda stack: stack.config.seed))
        return self._thread.wait(check_webhook(url, questions))

    def snapshot(self, name: str = "snapshot") -> None:
        """Keep what the stack is now."""
        self.control.snapshot(name)

    def revert(self, name: str = "snapshot") -> None:
        """Make it what it was at that snapshot."""
        self.control.revert(name)

    def reset(self) -> None:
        """Make it what it was when it became ready."""
        self.control.reset()

    @contextmanager
    def put_back(self) -> Iterator[Self]:
        """Make it what it is now again, at the end of the block; the journal looks at the block alone."""
        name = "before-the-test"
        self.snapshot(name)
        self.journal.start()
        try:
            yield self
        finally:
            self.revert(name)
            self.control.forget_snapshot(name)

    # ---- for its parts

    def in_thread(self, work: Callable[[Stack], T]) -> T:
        """Call something with the `Stack` itself, in its own thread."""
        return self._thread.call(lambda: work(self._stack))

    def post(self, url: str, fields: Mapping[str, Any], root: Path | None = None) -> dict[str, Any]:
        """POST JSON, and read the answer; raise `Refused` for a status that is none of success."""
        trust = True if root is None else client_context(root_ca=root.read_text())
        return self._thread.wait(_post(url, fields, trust))

    def _free_name(self, stem: str, number: int = 2) -> str:
        taken = self.in_thread(lambda stack: {*stack.guests, *stack.services, *stack.intel.platforms})
        while f"{stem}-{number}" in taken:
            number += 1
        return f"{stem}-{number}"


async def _post(url: str, fields: Mapping[str, Any], trust: ssl.SSLContext | bool) -> dict[str, Any]:
    timeout = aiohttp.ClientTimeout(total=TIMEOUT)
    async with (
        aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(ssl=trust)) as session,
        session.post(url, json=dict(fields)) as response,
    ):
        text = await response.text()
        try:
            answer = json.loads(text) if text else {}
        except ValueError:
            answer = {"error": text}
        if response.status >= 400:
            raise Refused(str(answer.get("error", text) if isinstance(answer, dict) else text), response.status)
        return answer if isinstance(answer, dict) else {"": answer}


def _plain(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Fields as the control takes them."""
    plain = dict(spec)
    if isinstance(compose := plain.get("compose"), Mapping):
        plain["compose"] = json.dumps(compose)
    if isinstance(platform := plain.get("platform"), LivePlatform):
        plain["platform"] = platform.name
    if isinstance(image := plain.get("image"), LiveImage):
        plain |= {"image": image.name, "image_version": image.version}
    if isinstance(webhook := plain.get("webhook"), LiveKms):
        plain["webhook"] = webhook.name
    return plain
