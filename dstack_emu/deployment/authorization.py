"""Setting two KMS up from outside: measure, allow, bootstrap, onboard, finish.

Nothing but their public interfaces is used, and the policy files of their webhooks; so it is the same for services in
processes or containers of their own, and for real KMS. A KMS that has keys already is left as it is.
"""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import aiohttp
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from dstack_emu.attest.errors import AttestError
from dstack_emu.attest.proto import dstack_guest_pb2 as guest_pb
from dstack_emu.attest.proto import kms_pb2 as pb
from dstack_emu.attest.prpc import encode_json
from dstack_emu.deployment import policy_files
from dstack_emu.deployment.config import StackError
from dstack_emu.transport.client import PrpcClient, RpcError, TransportError, describe_failure
from dstack_emu.transport.tls import client_context

TIMEOUT: Final = 30.0
PAUSE: Final = 0.1
"""Seconds between two looks at a service that is not there yet."""

Phase = Literal["onboard", "runtime"]
Progress = Callable[[str], None]
M = TypeVar("M", bound=Message)


def plain(url: str) -> str:
    """The URL of a KMS in its onboard phase, which speaks no TLS."""
    return "http://" + url.rstrip("/").partition("://")[2]


def secure(url: str) -> str:
    """The URL of a KMS in its runtime phase."""
    return "https://" + url.rstrip("/").partition("://")[2]


@dataclass(frozen=True, slots=True)
class RemoteKms:
    """One KMS: its name in messages, its URL (of either scheme), and the domain that its certificate shall have."""

    name: str
    url: str
    domain: str

    async def phase(self) -> Phase:
        """Find out by asking for its health with TLS and without; raise `StackError` where neither is answered."""
        context = client_context()  # nothing is verified: the question is only whether it answers
        timeout = aiohttp.ClientTimeout(total=TIMEOUT)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(ssl=context)) as session:
            try:
                async with session.get(f"{plain(self.url)}/health") as response:
                    if response.status == 200:
                        return "onboard"
            except (aiohttp.ClientError, OSError, TimeoutError):
                pass  # a TLS port does not answer plain HTTP
            try:
                async with session.get(f"{secure(self.url)}/health") as response:
                    if response.status == 200:
                        return "runtime"
                    raise StackError(f"{self.name} at {self.url} answered {response.status} to /health, 200 expected")
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                raise StackError(f"{self.name} at {self.url}: {describe_failure(error, TIMEOUT)}") from error

    async def measure(self) -> dict[str, Any]:
        """Ask what it measures, as it says it to a person."""
        info = await self._ask("GetAttestationInfo", Empty(), pb.AttestationInfoResponse)
        measured: dict[str, Any] = json.loads(encode_json(info))
        return measured

    async def bootstrap(self) -> None:
        """Have it make keys."""
        await self._ask("Bootstrap", pb.BootstrapRequest(domain=self.domain), pb.BootstrapResponse)

    async def onboard(self, source_url: str) -> None:
        """Have it take over the keys of the KMS at `source_url`, as seen from where it runs."""
        request = pb.OnboardRequest(source_url=f"{source_url}/prpc", domain=self.domain)
        await self._ask("Onboard", request, pb.OnboardResponse)

    async def finish(self) -> None:
        """End its onboard phase."""
        await self._ask("Finish", Empty(), Empty)

    async def reached_runtime(self) -> None:
        """Wait until it answers over TLS."""
        for _ in range(int(TIMEOUT / PAUSE)):
            if await self._phase_or_none() == "runtime":
                return
            await asyncio.sleep(PAUSE)
        raise StackError(f"{self.name} does not answer over TLS {TIMEOUT:g} s after /finish")

    async def _phase_or_none(self) -> Phase | None:
        try:
            return await self.phase()
        except StackError:
            return None

    async def _ask(self, method: str, request: Message, answer: type[M]) -> M:
        async with PrpcClient(plain(self.url), timeout=TIMEOUT) as client:
            try:
                return await client.call(f"prpc/Onboard.{method}", request, answer)
            except RpcError as error:
                raise StackError(f"{self.name}: {method}: {error.text}") from error
            except (TransportError, AttestError) as error:
                raise StackError(f"{self.name}: {method}: {error}") from error


@dataclass(frozen=True, slots=True)
class RemoteApp:
    """The guest agent of an app that waits for its keys, by URL."""

    url: str

    async def info(self) -> guest_pb.AppInfo:
        """Ask who it is."""
        try:
            async with PrpcClient(self.url, timeout=TIMEOUT) as client:
                return await client.call("Info", Empty(), guest_pb.AppInfo)
        except (RpcError, TransportError, AttestError) as error:
            raise StackError(f"app: Info: {error}") from error

    async def rule(self) -> dict[policy_files.AppRule, str]:
        """What a policy needs to admit it, with its OS image's hash."""
        info = await self.info()
        return {policy_files.AppRule(info.app_id.hex(), info.compose_hash.hex()): info.os_image_hash.hex()}

    async def has_keys(self) -> None:
        """Wait until it has its keys; raise `StackError` with its own last words where that takes too long."""
        said = ""
        async with PrpcClient(self.url, timeout=TIMEOUT) as client:
            for _ in range(int(TIMEOUT / PAUSE)):
                try:
                    await client.call("GetKey", guest_pb.GetKeyArgs(), guest_pb.GetKeyResponse)
                except (RpcError, TransportError) as error:
                    said = str(error)
                    await asyncio.sleep(PAUSE)
                else:
                    return
        raise StackError(f"the app has no keys after {TIMEOUT:g} s: {said}")


async def set_up(
    source: RemoteKms,
    target: RemoteKms,
    app: RemoteApp | None,
    policies: Sequence[Path],
    source_url: str,
    progress: Progress,
) -> None:
    """Walk the runbook to its end. `source_url` is where the target finds the source, `https://host:port`."""
    fresh = [kms for kms in (source, target) if await kms.phase() == "onboard"]
    if fresh:
        progress("measuring and allowing")
        measured = {kms.name: await kms.measure() for kms in fresh}
        policy_files.admit(policies, measured.values(), {} if app is None else await app.rule(), progress)
    if source in fresh:
        progress(f"bootstrapping {source.name}")
        await source.bootstrap()
        await source.finish()
        await source.reached_runtime()
    if target in fresh:
        progress(f"onboarding {target.name} from {source.name}")
        await target.onboard(source_url)
        await target.finish()
        await target.reached_runtime()
    if app is not None:
        progress("waiting for the app's keys")
        await app.has_keys()
