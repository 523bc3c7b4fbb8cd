"""A running stack for a test. Its methods return the part of a name, and add it if it does not exist."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from dstack_emu.deployment.config import StackConfig
from dstack_emu.simulator.image import OsImage
from dstack_emu.stack import Stack
from dstack_emu.testing.access import StackAccess
from dstack_emu.testing.chain import LiveChain
from dstack_emu.testing.clock import LiveClock
from dstack_emu.testing.faults import LiveFault
from dstack_emu.testing.gateway import LiveGateway
from dstack_emu.testing.journal import LiveJournal
from dstack_emu.testing.kms import LiveKms, LivePolicy
from dstack_emu.testing.platforms import LiveImage, LivePlatform, LiveVendor
from dstack_emu.testing.stack_thread import StackThread, SyncControl
from dstack_emu.testing.trust_domains import LiveTrustDomain
from dstack_emu.webhook_check.allowed import from_document, from_guests
from dstack_emu.webhook_check.check import Report, check_webhook
from dstack_emu.webhook_check.expectations import parse_expectations
from dstack_emu.webhook_check.safety import SafetyReport, check_safety
from dstack_emu.webhook_check.sample_requests import SampleRequests

T = TypeVar("T")


class LiveStack:
    """A stack in a thread of its own, on free ports; `settings` are fields of `StackConfig`.

    Use it as a context manager. `control` has every call of docs/control.md, without `await`; the other methods
    make these calls with the classes of this package. It may be used from any thread.
    """

    journal: LiveJournal
    clock: LiveClock
    vendor: LiveVendor

    def __init__(self, **settings: Any) -> None:
        self._thread = StackThread(StackConfig.on_free_ports(**settings))

    def __enter__(self) -> Self:
        self._access = access = StackAccess(self._thread, self._thread.start())
        self.journal, self.clock, self.vendor = LiveJournal(access), LiveClock(access), LiveVendor(access)
        self.journal.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.stop()

    # ---- the stack

    @property
    def control(self) -> SyncControl:
        """Every call of docs/control.md, without `await`."""
        return self._access.control

    @property
    def description(self) -> dict[str, Any]:
        """The description of the stack that `dstack-emu up --json` prints."""
        return self.in_thread(lambda stack: stack.description())

    @property
    def services(self) -> dict[str, str]:
        """The URL of each service."""
        return self.in_thread(lambda stack: dict(stack.services))

    @property
    def pccs_url(self) -> str:
        """The URL of the PCCS."""
        return self.services["pccs"]

    @property
    def root_ca(self) -> Path:
        """The emulated Intel's root certificate (PEM)."""
        return self.in_thread(lambda stack: stack.root_ca)

    # ---- its parts

    @property
    def gateway(self) -> LiveGateway:
        """The gateway, if the stack has one."""
        return LiveGateway(self._access)

    @property
    def chain(self) -> LiveChain:
        """The chain of the stack, if contracts decide in it."""
        return LiveChain(self._access)

    def app(self, name: str | None = None, **spec: Any) -> LiveTrustDomain:
        """Return the app of that name; with fields of `trust_domain`, add an app.

        Without a name it is the stack's own app; an added one is named `app-2`, `app-3`, …
        """
        if name is None:
            name = "app" if not spec else self._free_name("app")
        return self.trust_domain(name, **spec)

    def trust_domain(self, name: str, **spec: Any) -> LiveTrustDomain:
        """Return the trust domain of that name; add one, powered on and without keys, if there is none.

        `spec` has the fields of docs/control.md; `compose` may be a dict, `platform` a `LivePlatform`, `image` a
        `LiveImage`.
        """
        if spec or name not in self.in_thread(lambda stack: dict(stack.guests)):
            self.control.add_guest(name, **_plain(spec))
        return LiveTrustDomain(self._access, name)

    def kms(self, name: str = "src", **spec: Any) -> LiveKms:
        """Return the KMS of that name; add one without keys (fields of docs/control.md) if there is none."""
        if spec or name not in self.in_thread(lambda stack: dict(stack.kms)):
            self.control.add_kms(name, **_plain(spec))
        return LiveKms(self._access, name)

    def platform(self, name: str | None = None, **state: Any) -> LivePlatform:
        """Return the platform of that name, added if there is none; set its state if fields are given.

        Without a name it is a new one: `machine-1`, `machine-2`, …
        """
        platform = LivePlatform(self._access, self._free_name("machine", 1) if name is None else name)
        self.control.add_platform(platform.name)
        return platform.set(**state) if state else platform

    def image(self, name: str | None = None, version: str | None = None) -> LiveImage:
        """Return an OS image; without a name, the one that all parts boot that name none.

        Its version is that of the stack's release unless another is given.
        """

        def made(stack: Stack) -> LiveImage:
            context = stack.context
            made_of = version or context.release_of(None).version
            image = context.image if name is None else OsImage.from_seed(context.seed.derive, name, made_of)
            return LiveImage(name, image.version, image.os_image_hash.hex())

        return self.in_thread(made)

    def policy(self, kms: LiveKms | str = "src") -> LivePolicy:
        """Return the policy of a KMS's webhook; raise `ControlError` if there is no such KMS."""
        return (LiveKms(self._access, kms) if isinstance(kms, str) else kms).policy

    # ---- actions

    def boot(
        self, app: LiveTrustDomain | str | None = None, kms: LiveKms | str | Sequence[LiveKms | str] = "src"
    ) -> LiveTrustDomain:
        """Let an app (by default the stack's own) fetch keys from a KMS, or the first of several that releases them.

        Raises `Refused` with the KMS's text, `ControlError` if there is no trust domain or KMS of a name.
        """
        if app is None or isinstance(app, str):
            app = LiveTrustDomain(self._access, app or "app")
        return app.boot(kms)

    def fault(self, *, must_apply: bool = True, **fields: Any) -> LiveFault:
        """Put a fault in force (fields of docs/control.md) for a `with` block, or until the test ends.

        If it was applied to no call when its block ends, the block raises `AssertionError`, unless `must_apply` is
        false.
        """
        rule = self.in_thread(lambda stack: stack.control.add_fault(**fields))
        return LiveFault(self._access, rule, must_apply=must_apply)

    def check_webhook(self, url: str) -> Report:
        """Send a webhook every request that a KMS sends, as `dstack-emu check-webhook` does, and return the report."""
        seed, release = self.in_thread(lambda stack: (stack.config.seed, stack.context.release_of(None)))
        return self._thread.wait(check_webhook(url, SampleRequests.of_seed(seed, release), release=release))

    def check_webhook_safety(
        self, url: str, *, allowed: Any = None, expect: Mapping[str, str] | None = None
    ) -> SafetyReport:
        """Change one thing at a time in a request that a webhook allows, and report what it still allows.

        `allowed` and `expect` are the parsed JSON of `dstack-emu check-webhook --allowed` and `--expect`. By default
        the webhook has to allow the source KMS and the app of the stack. The answers of auth-simple under the contract
        of the stack's release are expected. Raises `SampleError` if an argument cannot be used.
        """
        seed, release = self.in_thread(lambda stack: (stack.config.seed, stack.context.release_of(None)))
        contract, samples = release.auth_contract, SampleRequests.of_seed(seed, release)
        if allowed is None:
            requests = from_guests(
                self.control.describe()["guests"], samples, "the source KMS and the app of the stack"
            )
        else:
            requests = from_document(allowed, samples, contract, "the argument `allowed`")
        expectations = parse_expectations(expect or {})
        return self._thread.wait(check_safety(url, requests, contract, expectations=expectations, release=release))

    def snapshot(self, name: str = "snapshot") -> None:
        """Take a snapshot of the stack."""
        self.control.snapshot(name)

    def revert(self, name: str = "snapshot") -> None:
        """Restore the state of a snapshot."""
        self.control.revert(name)

    def reset(self) -> None:
        """Restore the state in which the stack became ready."""
        self.control.reset()

    @contextmanager
    def put_back(self) -> Iterator[Self]:
        """Restore the present state at the end of the block; meanwhile, the journal begins with the block."""
        name = "before-the-test"
        self.snapshot(name)
        self.journal.start()
        try:
            yield self
        finally:
            self.revert(name)
            self.control.forget_snapshot(name)

    # ---- the stack itself

    def in_thread(self, work: Callable[[Stack], T]) -> T:
        """Call a function with the `Stack`, in the stack's thread."""
        return self._access.in_thread(work)

    def post(self, url: str, fields: Mapping[str, Any], root: Path | None = None) -> dict[str, Any]:
        """POST JSON and return the answer; raise `Refused` for a status of 400 or above.

        `root` is the file of the root certificate (PEM) under which the server is verified.
        """
        return self._access.post(url, fields, root)

    def _free_name(self, stem: str, number: int = 2) -> str:
        taken = self.in_thread(lambda stack: {*stack.guests, *stack.services, *stack.intel.platforms})
        while f"{stem}-{number}" in taken:
            number += 1
        return f"{stem}-{number}"


def _plain(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields in the types of the control API."""
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
