"""One trial of a KMS by one case: the calls that it makes, and the result that each of them must have.

A wrong decision ends the trial with a `DepartureError`. A right decision in other words than upstream's is a warning.
"""

import asyncio
import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from dstack_emu.attest.release import Release
from dstack_emu.kms_check.calls import Answer, call, request, server_certificate
from dstack_emu.transport.tls import Identity

if TYPE_CHECKING:
    from dstack_emu.kms_check.world import World

Level = Literal["ok", "warning", "failed"]

REFUSED_STATUS: Final = 400
"""The status of every refusal of pRPC."""


class DepartureError(Exception):
    """The KMS did not do what it must: what was done, the result, and what was expected."""

    def __init__(self, what: str, got: str, expected: str) -> None:
        super().__init__(f"{what}: {expected} expected, got {got}")
        self.what, self.got, self.expected = what, got, expected


@dataclass(frozen=True, slots=True)
class Step:
    """One call of a trial, or one comparison: what was expected and what was got."""

    what: str
    expected: str
    got: str
    level: Level

    def to_json(self) -> dict[str, str]:
        """Return it as JSON."""
        return {"what": self.what, "expected": self.expected, "got": self.got, "level": self.level}


class Trial:
    """The calls of one case, and their evaluation. `steps` are all so far."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.steps: list[Step] = []

    @property
    def release(self) -> Release:
        """The dstack release that the KMS is of."""
        return self.world.release

    # ---- calls

    async def call(self, method: str, identity: Identity | None = None, **arguments: Any) -> Answer:
        """Call an RPC of the running KMS."""
        return await call(self.world.kms.url, method, arguments, identity, patience=self.world.patience)

    async def onboard(self, method: str, **arguments: Any) -> Answer:
        """Call an RPC of the onboard phase."""
        return await call(self.world.kms.plain_url, f"Onboard.{method}", arguments, patience=self.world.long_patience)

    async def app_key_within(self, seconds: float) -> Answer:
        """Call GetAppKey, and wait at most so many seconds."""
        shown, arguments = self.world.app_identity, {"api_version": 1}
        return await call(self.world.kms.url, "KMS.GetAppKey", arguments, shown, patience=seconds)

    async def app_key(self, identity: Identity | None = None, **arguments: Any) -> Answer:
        """Call GetAppKey, by default with honest evidence of the app."""
        shown = identity or self.world.app_identity
        return await self.call("KMS.GetAppKey", shown, **{"api_version": 1, **arguments})

    async def kms_key(self, identity: Identity | None = None, **arguments: Any) -> Answer:
        """Call GetKmsKey, by default with honest evidence of a KMS that is allowed."""
        return await self.call("KMS.GetKmsKey", identity or self.world.kms_identity, **arguments)

    async def temp_ca(self) -> Answer:
        """Call GetTempCaCert, which needs no certificate."""
        return await self.call("KMS.GetTempCaCert")

    async def env_key(self, app_id: bytes) -> Answer:
        """Call GetAppEnvEncryptPubKey."""
        return await self.call("KMS.GetAppEnvEncryptPubKey", app_id=app_id.hex())

    async def sign(self, arguments: dict[str, Any]) -> Answer:
        """Call SignCert, without a client certificate."""
        return await self.call("KMS.SignCert", **arguments)

    async def page(self, path: str) -> Answer:
        """GET a page of the running KMS."""
        return await request("GET", f"{self.world.kms.url}{path}", patience=self.world.patience)

    async def server_certificate(self) -> bytes:
        """Return the certificate (DER) of the running KMS; it is empty if none was shown."""
        return await server_certificate(self.world.kms.url, patience=self.world.patience)

    async def settle(self) -> None:
        """Wait until the KMS no longer uses an earlier answer about itself, if the options say that it keeps one."""
        if self.world.self_check_cache:
            await asyncio.sleep(self.world.self_check_cache)

    # ---- evaluation

    def released(self, what: str, answer: Answer) -> dict[str, Any]:
        """Require a success; return its body."""
        self._require(what, answer.is_success and isinstance(answer.body, dict), answer.shown, "200 with JSON")
        body: dict[str, Any] = answer.body
        return body

    def refused(self, what: str, answer: Answer, text: str = "") -> None:
        """Require a refusal by status 400; another text than upstream's is a warning."""
        expected = f"{REFUSED_STATUS}: {text}" if text else f"a refusal by status {REFUSED_STATUS}"
        self._require_nothing_released(what, answer, expected)
        self._require(what, answer.status == REFUSED_STATUS, answer.shown, expected, is_last=not text)
        if text:
            self._note(what, text in answer.refusal, answer.shown, expected)

    def shut_out(self, what: str, answer: Answer) -> None:
        """Require the handshake to fail; a refusal by an answer is a warning."""
        expected = "the TLS handshake fails"
        self._require_nothing_released(what, answer, expected)
        self._note(what, answer.status == 0, answer.shown, expected)

    def held(self, what: str, answer: Answer) -> None:
        """Require that nothing is released: a refusal, or no answer in time."""
        expected = "a refusal, or no answer"
        self._require_nothing_released(what, answer, expected)
        self._note(what, True, answer.shown, expected)

    def advised(self, what: str, answer: Answer, why: str) -> None:
        """Expect a refusal that dstack's own KMS does not make; a release is a warning, which says why."""
        self._note(what, not answer.is_success, answer.shown, f"a refusal ({why})")

    def equal(self, what: str, got: object, expected: object) -> None:
        """Require a value."""
        self._require(what, got == expected, _shown(got), _shown(expected))

    def differ(self, what: str, one: object, other: object) -> None:
        """Require two values to be different. Secret values are not shown."""
        self._require(what, one != other, "equal values", "different values")

    def same_secret(self, what: str, one: object, other: object) -> None:
        """Require two secret values to be equal; they are not shown."""
        self._require(what, one == other, "different values", "equal values")

    def true(self, what: str, is_so: bool, got: str, expected: str) -> None:
        """Require a condition."""
        self._require(what, is_so, got, expected)

    def note(self, what: str, is_so: bool, got: str, expected: str) -> None:
        """Expect a condition; otherwise it is a warning."""
        self._note(what, is_so, got, expected)

    def member(self, what: str, body: dict[str, Any], name: str) -> str:
        """Return a text of an answer; require it to be there and not empty."""
        value = body.get(name)
        self._require(what, isinstance(value, str) and bool(value), f"{name}: {_shown(value)}", f"{name}: a text")
        return str(value)

    def octets(self, what: str, body: dict[str, Any], name: str) -> bytes:
        """Return bytes of an answer, which are in hex, or in base64 as protobuf's own JSON has them."""
        text = self.member(what, body, name)
        try:
            return bytes.fromhex(text)
        except ValueError:
            pass
        try:
            return base64.b64decode(text, validate=True)
        except ValueError:
            raise DepartureError(what, f"{name}: other text", f"{name}: bytes in hex") from None

    def _require_nothing_released(self, what: str, answer: Answer, expected: str) -> None:
        self._require(what, not answer.is_success, answer.shown, expected, is_last=False)
        self._require(what, not answer.has_secret, "a refusal that contains a secret key", expected, is_last=False)

    def _require(self, what: str, is_so: bool, got: str, expected: str, *, is_last: bool = True) -> None:
        if not is_so:
            self.steps.append(Step(what, expected, got, "failed"))
            raise DepartureError(what, got, expected)
        if is_last:
            self.steps.append(Step(what, expected, got, "ok"))

    def _note(self, what: str, is_so: bool, got: str, expected: str) -> None:
        self.steps.append(Step(what, expected, got, "ok" if is_so else "warning"))


def _shown(value: object) -> str:
    text = value.hex() if isinstance(value, bytes) else str(value)
    return text if len(text) <= 300 else f"{text[:300]}…"
