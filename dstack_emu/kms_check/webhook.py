"""The webhook of the KMS that is checked: auth-simple's decisions over a policy in memory, or any answer instead.

It records the requests, so that a case sees what the KMS says of a caller. A policy is replaced at once: from then on
every request is decided by the new one.
"""

import asyncio
import copy
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal

from dstack_emu.attest.release import Release
from dstack_emu.auth.boot_info import parse_boot_info
from dstack_emu.auth.errors import BootInfoError
from dstack_emu.auth.policy import Policy, evaluate
from dstack_emu.transport.http import Application, Request, Response
from dstack_emu.transport.listen import Server, bind_tcp, reset, serve

Question = Literal["kms", "app", "info"]
Reply = Callable[[Request], Awaitable[Response]]
"""Answers one request of the KMS in place of a decision."""

ALLOW: Final = {"isAllowed": True, "reason": "", "gatewayAppId": "any"}
DENY: Final = {"isAllowed": False, "reason": "denied by check-kms", "gatewayAppId": ""}
INFO: Final = {
    "status": "ok",
    "kmsContractAddr": "0x" + "00" * 20,
    "gatewayAppId": "any",
    "chainId": 0,
    "appImplementation": "0x" + "00" * 20,
}
_PATHS: Final[Mapping[tuple[str, str], Question]] = {
    ("POST", "/bootAuth/kms"): "kms",
    ("POST", "/bootAuth/app"): "app",
    ("GET", "/"): "info",
}
_JSON: Final = "application/json"


@dataclass(frozen=True, slots=True)
class Asked:
    """One request of the KMS: which question, and its body, parsed."""

    question: Question
    body: Any


class Webhook:
    """The server. `policy` is the present policy of auth-simple; `asked` are the requests so far."""

    def __init__(self, release: Release) -> None:
        self._release = release
        self._server: Server | None = None
        self._app, self._port = self._application(), 0
        self._replies: dict[Question, tuple[Reply, str]] = {}
        self._lifted = asyncio.Event()
        self.policy: dict[str, Any] = {}
        self.asked: list[Asked] = []

    async def start(self) -> None:
        """Listen on a free port of 127.0.0.1."""
        sock = bind_tcp("127.0.0.1", 0)
        self._port = int(sock.getsockname()[1])
        self._server = await serve(self._app, sock)

    @property
    def url(self) -> str:
        """The value of core.auth_api.webhook.url."""
        return f"http://127.0.0.1:{self._port}"

    async def close(self) -> None:
        """Stop listening."""
        self._lift()
        await self._server_of_now.close()

    @property
    def _server_of_now(self) -> Server:
        if self._server is None:
            raise RuntimeError("the webhook was not started")
        return self._server

    def _application(self) -> Application:
        app = Application()
        for (method, path), question in _PATHS.items():
            app.add(method, path, self._handler(question))
        return app

    # ---- what it answers

    @contextmanager
    def replies(self, question: Question, reply: Reply, *, about: bytes = b"") -> Iterator[None]:
        """Answer a question by a reply while the block runs; with `about`, only a question about that app id."""
        self._replies[question] = reply, about.hex()
        try:
            yield
        finally:
            self._replies.pop(question, None)
            self._lift()

    @contextmanager
    def changed(self, change: Callable[[dict[str, Any]], object]) -> Iterator[None]:
        """Decide by a changed policy while the block runs."""
        before, policy = self.policy, copy.deepcopy(self.policy)
        change(policy)
        self.policy = policy
        try:
            yield
        finally:
            self.policy = before

    @asynccontextmanager
    async def down(self) -> AsyncIterator[None]:
        """Refuse connections while the block runs."""
        await self._server_of_now.close()
        try:
            yield
        finally:
            self._server = await serve(self._app, bind_tcp("127.0.0.1", self._port))

    def seen(self, question: Question) -> list[Any]:
        """Return the bodies of the requests of one question, and forget all requests."""
        found = [each.body for each in self.asked if each.question == question]
        self.asked.clear()
        return found

    async def hang(self, request: Request) -> Response:
        """Answer nothing until the case ends."""
        await self._lifted.wait()
        reset(request.transport)
        return Response()

    def _lift(self) -> None:
        self._lifted.set()
        self._lifted = asyncio.Event()

    def _handler(self, question: Question) -> Reply:
        async def handle(request: Request) -> Response:
            body = await request.read()
            document = json.loads(body) if body else None
            self.asked.append(Asked(question, document))
            reply, about = self._replies.get(question, (None, ""))
            if reply is not None and (not about or _app_id(document) == about):
                return await reply(request)
            return answer_json(INFO) if question == "info" else self._decide(document, is_kms=question == "kms")

        return handle

    def _decide(self, document: Any, *, is_kms: bool) -> Response:
        try:
            boot_info = parse_boot_info(document)
        except BootInfoError as error:
            return Response.of(str(error), "text/plain", 400)
        policy = Policy.model_validate(self.policy)
        decision = evaluate(policy, boot_info, is_kms, contract=self._release.auth_contract)
        said = {"isAllowed": decision.is_allowed, "reason": decision.reason, "gatewayAppId": decision.gateway_app_id}
        return answer_json(said)


def _app_id(document: Any) -> Any:
    return document.get("appId") if isinstance(document, dict) else None


def answer_json(document: object) -> Response:
    """Make a 200 with JSON."""
    return Response.of(json.dumps(document).encode(), _JSON)
