"""Trust domains of a stack with their agents: those it begins with, and those that are made while it runs."""

from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from dstack_emu.attest.errors import FormatError
from dstack_emu.deployment.guest import instance_seed
from dstack_emu.observability.spans import entered, headers_of
from dstack_emu.simulator.agent import GuestAgent
from dstack_emu.simulator.agent_server import dstack_app, tappd_app, tcp_app
from dstack_emu.simulator.errors import GuestError
from dstack_emu.simulator.guest_boot import KmsIssuer, fetch_keys
from dstack_emu.simulator.image import OsImage
from dstack_emu.simulator.seed import Seed, Stream
from dstack_emu.simulator.trust_domain import AppCompose, DomainSettings, TrustDomain
from dstack_emu.transport.listen import bind_tcp, bind_unix, reachable, reserve_unix, serve
from dstack_emu.transport.ratls import TIMEOUT as KMS_TIMEOUT

if TYPE_CHECKING:
    from dstack_emu.deployment.stack import Stack

Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,31}$")]
Hex = Annotated[str, StringConstraints(pattern=r"^(0x)?([0-9a-fA-F]{2})*$", max_length=20_000)]
GIB: Final = 1024**3


def octets(text: str) -> bytes:
    """Read hex, with 0x or without."""
    return bytes.fromhex(text.removeprefix("0x"))


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EventSpec(_Spec):
    """One runtime event; `payload` is hex. With `measured` false the log claims it and no register holds it."""

    event: Annotated[str, Field(min_length=1, max_length=200)]
    payload: Hex = ""
    measured: bool = True


class GuestSpec(_Spec):
    """Who a trust domain is: everything that is measured, and the machine it runs on.

    `app_id` is the first 20 bytes of the compose hash unless given; `compose` the text of its app-compose.json, made up
    unless given. Without `image` it boots the stack's own. `events` follow the boot's own, before keys are fetched.
    `instance` tells instances of an app apart.
    """

    name: Name
    app_id: Hex | None = None
    compose: str | None = None
    instance: str | None = None
    image: str | None = None
    image_version: str = "0.5.11"
    platform: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    cpu_count: Annotated[int, Field(ge=1, le=1024)] = 2
    memory_size: Annotated[int, Field(ge=1)] = 2 * GIB
    debug: bool = False
    mr_config_id: Hex = "00" * 48
    quote_version: Annotated[int, Field(ge=4, le=5)] = 4
    events: Annotated[tuple[EventSpec, ...], Field(max_length=1000)] = ()

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        if self.app_id is not None and len(octets(self.app_id)) != 20:
            raise ValueError(f"app_id: 20 bytes expected, got {len(octets(self.app_id))}")
        return self

    @property
    def machine(self) -> str:
        """The platform's name."""
        return self.platform or f"host of {self.name}"

    def power_on(self, stack: "Stack") -> TrustDomain:
        """Boot it, up to where it needs keys; raise `FormatError` for a machine or an app-compose that cannot be."""
        derive = stack.seed.derive
        image = stack.image if self.image is None else OsImage.from_seed(derive, self.image, self.image_version)
        domain = TrustDomain(
            stack.intel.platform(self.machine),
            image,
            AppCompose.named(self.name) if self.compose is None else AppCompose.parse(self.compose),
            instance_seed=instance_seed(stack.seed, self.instance or self.name),
            vm_config=image.vm_config(self.cpu_count, self.memory_size),
            app_id=None if self.app_id is None else octets(self.app_id),
            settings=DomainSettings(self.debug, octets(self.mr_config_id), self.quote_version),
        )
        domain.boot()
        for event in self.events:
            (domain.measure if event.measured else domain.claim)(event.event, octets(event.payload))
        return domain


class RunningGuest:
    """A trust domain whose agent answers. `boot` gets it keys of a KMS; `close` ends it."""

    def __init__(self, spec: GuestSpec, service: str, domain: TrustDomain, streams: Mapping[str, Stream]) -> None:
        self.spec, self.service, self.domain, self.streams = spec, service, domain, dict(streams)
        self.agent = GuestAgent(domain, self.streams["agent"])
        self.issuer: KmsIssuer | None = None
        self.kms = ""
        self.folder = Path()
        self.url = ""
        self._exit = AsyncExitStack()

    @property
    def name(self) -> str:
        """What it is called."""
        return self.spec.name

    async def listen(self, stack: "Stack") -> None:
        """Let the agent listen: two sockets in the state folder, and a TCP port."""
        self.folder = stack.state / self.name
        self.folder.mkdir(exist_ok=True, mode=0o700)
        world = stack.world
        for app, file in ((dstack_app, "dstack.sock"), (tappd_app, "tappd.sock")):
            sock = bind_unix(self.folder / file, setting="--state DIR")
            with stack.logs.of(self.service):
                server = await serve(world.around(self.service, app(self.agent)), sock)
            self._exit.push_async_callback(server.close)
        sock = stack.take_socket(self.service) or bind_tcp(stack.config.host, 0)
        with stack.logs.of(self.service):
            server = await serve(world.around(self.service, tcp_app(self.agent)), sock)
        self._exit.push_async_callback(server.close)
        self.url = stack.services[self.service] = server.url
        await self._listen_by_grpc(stack)

    async def _listen_by_grpc(self, stack: "Stack") -> None:
        """Serve gRPC, too, where the stack does."""
        if not stack.config.grpc:
            return
        name = f"{self.service}-grpc"
        sock = stack.take_socket(name) or bind_tcp(stack.config.host, 0)
        from dstack_emu.simulator.agent_grpc import serve_agent  # costs time and memory that nobody else should pay

        path = reserve_unix(self.folder / "grpc.sock", setting="--state DIR")
        stack.grpc[name] = reachable(sock)
        self._exit.callback(stack.grpc.pop, name, None)
        with stack.logs.of(self.service):
            server = await serve_agent(self.agent, sock, path, interceptors=stack.world.interceptors(self.service))
        self._exit.push_async_callback(server.close)

    async def boot(self, stack: "Stack", kms: str) -> None:
        """Fetch keys from the KMS of that name and run with them.

        Raises `GuestError` with the refusal; all is then as it was before.
        """
        world = stack.world
        before, position = self.domain.capture(), self.streams["boot"].capture()
        call = world.journal.begin(self.name, "Boot", None, 0, "stack")
        status, error = 400, ""
        try:
            with entered(call):
                keys, issuer = await fetch_keys(
                    self.domain,
                    stack.services[f"kms-{kms}"],
                    stack.verifier,
                    self.streams["boot"],
                    world.clock.issue(),
                    patience=world.patience or KMS_TIMEOUT,
                    headers=headers_of(self.name),
                )
                try:
                    await self.agent.provide(keys, issuer)
                except BaseException:
                    await issuer.close()
                    raise
            await self.use(issuer, kms)
            status = 200
        except GuestError as refusal:
            self.domain.restore(before)
            self.streams["boot"].restore(position)
            error = world.journal.scrub(str(refusal))
            raise
        finally:
            world.journal.end(call, status, error)

    async def use(self, issuer: KmsIssuer | None, kms: str) -> None:
        """Note whose keys it has, and let go of the connections to the KMS it had them from before."""
        before, self.issuer, self.kms = self.issuer, issuer, kms
        if before is not None and before is not issuer:
            await before.close()

    async def close(self) -> None:
        """Stop listening."""
        await self._exit.aclose()
        await self.use(None, "")


async def start_guest(stack: "Stack", spec: GuestSpec, service: str, seed: Seed | None = None) -> RunningGuest:
    """Power a trust domain on and let its agent answer; raise `GuestError` where it cannot be."""
    if spec.name in stack.guests:
        raise GuestError(f"there is a trust domain {spec.name} already")
    own = seed or stack.seed.child(f"guest {spec.name}")
    try:
        domain = spec.power_on(stack)
    except FormatError as error:
        raise GuestError(f"trust domain {spec.name}: {error}") from error
    guest = RunningGuest(spec, service, domain, {"agent": own.stream("agent"), "boot": own.stream("boot")})
    try:
        await guest.listen(stack)
    except BaseException:
        await guest.close()
        raise
    stack.guests[spec.name] = guest
    return guest
