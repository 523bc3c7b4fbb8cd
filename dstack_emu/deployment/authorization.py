"""The authorization flow of two KMS: measure, allow, bootstrap, onboard, finish.

It uses only the public interface of the KMS, and the policy files of their webhooks. Therefore it works with the KMS of
a stack, with KMS in processes or containers, and with real ones. A KMS that has keys already is not changed.
"""

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, Literal, Protocol, TypeVar

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from dstack_emu.attest.errors import AttestError
from dstack_emu.attest.proto import dstack_guest_pb2 as guest_pb
from dstack_emu.attest.proto import kms_pb2 as pb
from dstack_emu.attest.prpc import encode_json
from dstack_emu.deployment import policy_files
from dstack_emu.deployment.errors import StackError
from dstack_emu.transport.client import MAX_RESPONSE, MoreHeaders, PrpcClient, RpcError, TransportError
from dstack_emu.transport.failures import NoAnswerError
from dstack_emu.transport.http_client import HttpClient
from dstack_emu.transport.secrets import Secrets
from dstack_emu.transport.tls import client_context
from dstack_emu.transport.urls import shown_url

TIMEOUT: Final = 30.0
PAUSE: Final = 0.1
"""Seconds between two requests to a service that does not answer yet."""

Phase = Literal["onboard", "runtime"]
Progress = Callable[[str], None]
Measurements = dict[str, Any]
"""The answer of a KMS to GetAttestationInfo, as JSON."""
M = TypeVar("M", bound=Message)


def plain_url(url: str) -> str:
    """Return the URL of a KMS in its onboard phase, which uses plain HTTP."""
    return "http://" + url.rstrip("/").partition("://")[2]


def tls_url(url: str) -> str:
    """Return the URL of a KMS in its runtime phase."""
    return "https://" + url.rstrip("/").partition("://")[2]


class PhaseSource(Protocol):
    """Finds the phase of a KMS."""

    async def current(self) -> Phase:
        """Return its phase; raise `StackError` if it does not answer."""
        ...

    async def reached_runtime(self) -> None:
        """Wait until it answers over TLS; raise `StackError` if it does not."""
        ...


class AppToAllow(Protocol):
    """The app that the policies will allow."""

    async def rule(self) -> Mapping[policy_files.AppRule, str]:
        """Return its rule, and the hash of its OS image (hex)."""
        ...


class ChainToAllow(Protocol):
    """The chain whose contracts will allow KMS and app."""

    async def admit(
        self,
        measured: Iterable[Measurements],
        apps: Mapping[policy_files.AppRule, str],
        gateway_app_id: str,
        progress: Progress,
    ) -> None:
        """Send the transactions, unless the contracts were changed before; raise `StackError`."""
        ...


@dataclass(frozen=True, slots=True)
class KmsOnboarding:
    """The onboard phase of one KMS: its RPCs, each of which raises `StackError` with the refusal.

    `name` is used in messages, `url` may be of either scheme, `domain` is the name that its certificate gets. `headers`
    are added to each request. With `old_spellings` its measurements have renamed members under their old names, too, as
    it answers them itself. `token` is its `core.onboard.auth_token`, for a KMS since 0.6 that has one. No error has a
    token, even if the KMS repeats it.
    """

    name: str
    url: str
    domain: str
    phases: PhaseSource
    headers: MoreHeaders | None = None
    old_spellings: bool = False
    token: str = field(default="", repr=False)

    async def measure(self) -> Measurements:
        """Return the measurements of the KMS."""
        info = await self._call("GetAttestationInfo", Empty(), pb.AttestationInfoResponse)
        measured: Measurements = json.loads(encode_json(info, old_spellings=self.old_spellings))
        return measured

    async def bootstrap(self) -> None:
        """Let the KMS generate keys, and end its onboard phase."""
        await self._call("Bootstrap", pb.BootstrapRequest(domain=self.domain), pb.BootstrapResponse)
        await self._finish()

    async def onboard(self, source_url: str, source_token: str = "") -> None:
        """Let the KMS receive the keys of the one at `source_url`, as it reaches that, and end its onboard phase.

        `source_token` is the token of the source's admin listener, if `source_url` is that.
        """
        request = pb.OnboardRequest(source_url=f"{source_url}/prpc", domain=self.domain, source_token=source_token)
        await self._call("Onboard", request, pb.OnboardResponse, Secrets(source_token))
        await self._finish()

    async def _finish(self) -> None:
        await self._call("Finish", Empty(), Empty)
        await self.phases.reached_runtime()

    async def _call(self, method: str, request: Message, answer: type[M], secrets: Secrets | None = None) -> M:
        secrets = secrets or Secrets()
        secrets.learn(self.token)
        async with PrpcClient(plain_url(self.url), timeout=TIMEOUT, headers=self._headers) as client:
            try:
                return await client.call(f"prpc/Onboard.{method}", request, answer)
            except RpcError as error:
                text = self._unauthorized() if error.status == HTTPStatus.UNAUTHORIZED else str(error)
            except (TransportError, AttestError) as error:
                text = str(error)
        raise StackError(f"{self.name}: {method}: {secrets.redact(text)}")

    def _headers(self) -> Mapping[str, str]:
        more = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        return {**(self.headers() if self.headers else {}), **more}

    def _unauthorized(self) -> str:
        given = "another token was given" if self.token else "none was given"
        return f"status 401: the KMS expects the token of its core.onboard.auth_token, and {given}"


@dataclass(frozen=True, slots=True)
class Authorization:
    """The flow for a source and a target KMS.

    `policies` are the files of their webhooks; a file is only written if it is still the placeholder. `source_url` is
    the URL of the source as the target reaches it, `https://host:port`; with a `source_token` that of its admin
    listener. `gateway_app_id` is what the policies say of the gateway. `chain` has contracts that decide beside them.
    """

    source: KmsOnboarding
    target: KmsOnboarding
    app: AppToAllow | None
    policies: Sequence[Path]
    source_url: str
    progress: Progress
    source_token: str = field(default="", repr=False)
    gateway_app_id: str = policy_files.ANY_GATEWAY
    chain: ChainToAllow | None = None

    async def carry_out(self, known: Mapping[str, Measurements] | None = None) -> dict[str, Measurements]:
        """Give keys to each KMS that has none; return the measurements of these KMS, by name.

        `known` are measurements from earlier, which are allowed, too. Raises `StackError`.
        """
        fresh = [kms for kms in (self.source, self.target) if await kms.phases.current() == "onboard"]
        measured = await self._measure_and_allow(fresh, known or {}) if fresh else {}
        if self.source in fresh:
            self.progress(f"bootstrapping {self.source.name}")
            await self.source.bootstrap()
        if self.target in fresh:
            self.progress(f"onboarding {self.target.name} from {self.source.name}")
            await self.target.onboard(self.source_url, self.source_token)
        return measured

    async def _measure_and_allow(
        self, fresh: Sequence[KmsOnboarding], known: Mapping[str, Measurements]
    ) -> dict[str, Measurements]:
        self.progress("measuring and allowing")
        measured = {kms.name: await kms.measure() for kms in fresh}
        apps = {} if self.app is None else await self.app.rule()
        infos = {**known, **measured}.values()
        policy_files.admit(self.policies, infos, apps, self.progress, gateway_app_id=self.gateway_app_id)
        if self.chain is not None:
            await self.chain.admit(infos, apps, self.gateway_app_id, self.progress)
        return measured


# ---- services that run elsewhere


async def _health(client: HttpClient, url: str) -> int:
    """Return the status of a service's page `/health`."""
    return (await client.send("GET", f"{url}/health", follow_redirects=True)).status


@dataclass(frozen=True, slots=True)
class PolledPhase:
    """Finds the phase of a KMS: whether it answers /health with TLS or without."""

    name: str
    url: str

    async def current(self) -> Phase:
        """Return its phase; raise `StackError` if it answers neither way."""
        # The certificate is not verified: only the status matters here.
        client = HttpClient(timeout=TIMEOUT, max_answer=MAX_RESPONSE, tls=client_context())
        try:
            with contextlib.suppress(NoAnswerError):  # a TLS port does not answer plain HTTP
                status = await _health(client, plain_url(self.url))
                if status in (
                    HTTPStatus.OK,
                    HTTPStatus.UNAUTHORIZED,
                ):  # a guarded onboard phase wants a token here, too
                    return "onboard"
            status = await _health(client, tls_url(self.url))
        except NoAnswerError as error:
            raise StackError(f"{self.name} at {shown_url(self.url)}: {error}") from error
        finally:
            await client.close()
        if status != HTTPStatus.OK:
            raise StackError(f"{self.name} at {shown_url(self.url)} answered {status} to /health, 200 expected")
        return "runtime"

    async def reached_runtime(self) -> None:
        """Wait until it answers over TLS; raise `StackError` after 30 s."""
        for _ in range(int(TIMEOUT / PAUSE)):
            if await self._current_or_none() == "runtime":
                return
            await asyncio.sleep(PAUSE)
        raise StackError(f"{self.name} does not answer over TLS {TIMEOUT:g} s after /finish")

    async def _current_or_none(self) -> Phase | None:
        try:
            return await self.current()
        except StackError:
            return None


def remote_kms(name: str, url: str, domain: str, token: str = "") -> KmsOnboarding:
    """Make the onboarding of a KMS that runs elsewhere; `token` is its `core.onboard.auth_token`, if it has one."""
    return KmsOnboarding(name, url, domain, PolledPhase(name, url), token=token)


@dataclass(frozen=True, slots=True)
class RemoteApp:
    """An app that runs elsewhere and waits for its keys; `url` is that of its guest agent."""

    url: str

    async def rule(self) -> dict[policy_files.AppRule, str]:
        """Return its rule, and the hash of its OS image (hex); raise `StackError` if its agent does not answer."""
        try:
            async with PrpcClient(self.url, timeout=TIMEOUT) as client:
                info = await client.call("Info", Empty(), guest_pb.AppInfo)
        except (RpcError, TransportError, AttestError) as error:
            raise StackError(f"app: Info: {error}") from error
        return {policy_files.AppRule(info.app_id.hex(), info.compose_hash.hex()): info.os_image_hash.hex()}

    async def has_keys(self) -> None:
        """Wait until it has its keys; after 30 s raise `StackError` with its last refusal."""
        refusal = ""
        async with PrpcClient(self.url, timeout=TIMEOUT) as client:
            for _ in range(int(TIMEOUT / PAUSE)):
                try:
                    await client.call("GetKey", guest_pb.GetKeyArgs(), guest_pb.GetKeyResponse)
                except (RpcError, TransportError) as error:
                    refusal = str(error)
                    await asyncio.sleep(PAUSE)
                else:
                    return
        raise StackError(f"the app has no keys after {TIMEOUT:g} s: {refusal}")
