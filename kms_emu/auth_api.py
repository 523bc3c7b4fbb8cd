"""Requests to the auth webhook: whether a trust domain may boot.

Everything except a valid decision is an error, and never allows: a webhook that is down, is slow, or answers another
status or a body that is not a decision. Texts are those of dstack `kms/src/main_service/upgrade_authority.rs` at
312dc605; only the words of its parsers are our own. Decisions are never cached.
"""

from dataclasses import dataclass
from typing import Any, Final, Protocol

from dstack_emu.attest.app_info import BootInfo
from dstack_emu.attest.release import DEFAULT, Release
from dstack_emu.attest.strict_json import ConstantError, StrictJson, has_lone_surrogate
from dstack_emu.kms_emu.errors import NotAttestedError, UnavailableError
from dstack_emu.transport.client import MoreHeaders
from dstack_emu.transport.failures import AnswerTooLongError, NoAnswerError
from dstack_emu.transport.http_client import HttpClient, Route, direct
from dstack_emu.transport.status import status_line
from dstack_emu.transport.urls import shown_url

TIMEOUT: Final = 10.0
"""Seconds that a KMS waits for its webhook, unless `core.auth_api.webhook.timeout` is set."""
MAX_ANSWER: Final = 1024 * 1024
SHOWN_BYTES: Final = 512
_JSON_TYPE: Final = {"Content-Type": "application/json"}


def kms_user_agent(release: Release) -> str:
    """Return the User-Agent of a KMS of this release."""
    return f"dstack-kms/{release.version}"


@dataclass(frozen=True, slots=True)
class Decision:
    """A webhook's answer."""

    is_allowed: bool
    reason: str
    gateway_app_id: str


@dataclass(frozen=True, slots=True)
class AuthInfo:
    """What a webhook says of itself; a field that it does not send is None."""

    is_dev: bool
    gateway_app_id: str | None
    kms_contract_address: str | None = None
    eth_rpc_url: str | None = None
    chain_id: int | None = None
    app_implementation: str | None = None


class AuthApi(Protocol):
    """The source of decisions: a webhook, or a rule for development."""

    async def decide(self, boot_info: BootInfo, *, is_kms: bool) -> Decision:
        """Request one decision; raise `UnavailableError` for any answer that is not a decision."""
        ...

    async def info(self) -> AuthInfo:
        """Request what it says of itself; raise `UnavailableError`."""
        ...

    async def close(self) -> None:
        """Close connections."""
        ...


@dataclass(frozen=True, slots=True)
class DevAuth:
    """auth_api `dev`: everything is allowed."""

    gateway_app_id: str

    async def decide(self, boot_info: BootInfo, *, is_kms: bool) -> Decision:
        """Allow."""
        return Decision(True, "", self.gateway_app_id)

    async def info(self) -> AuthInfo:
        """Return the constant info of this rule."""
        return AuthInfo(is_dev=True, gateway_app_id=self.gateway_app_id)

    async def close(self) -> None:
        """Do nothing: there are no connections."""


def require_identity_sizes(boot_info: BootInfo) -> None:
    """Raise `NotAttestedError` for a compose hash or instance id of another size than a KMS of 0.6 sends."""
    if len(boot_info.compose_hash) != 32:
        raise NotAttestedError("compose_hash must be 32 bytes")
    if len(boot_info.instance_id) not in (0, 20):
        raise NotAttestedError("instance_id must be 20 bytes or empty")


class IdentityCheckedAuth:
    """Refuses identities of other sizes without a request: a webhook might pad one to an identity that it allows."""

    def __init__(self, auth: AuthApi) -> None:
        self._auth = auth

    async def decide(self, boot_info: BootInfo, *, is_kms: bool) -> Decision:
        """Request one decision; raise `NotAttestedError` for a compose hash or instance id of another size."""
        require_identity_sizes(boot_info)
        return await self._auth.decide(boot_info, is_kms=is_kms)

    async def info(self) -> AuthInfo:
        """Request what the webhook says of itself."""
        return await self._auth.info()

    async def close(self) -> None:
        """Close connections."""
        await self._auth.close()


class WebhookAuth:
    """auth_api `webhook`, each request over a connection of its own; `headers` are added to each request. Close it."""

    def __init__(
        self,
        url: str,
        *,
        timeout: float = TIMEOUT,
        headers: MoreHeaders | None = None,
        release: Release = DEFAULT,
        route: Route = direct,
    ) -> None:
        self.url = url
        self._more_headers = headers
        self._variant_members = release.boot_info_variant_members
        user_agent = {"User-Agent": kms_user_agent(release)}
        self._client = HttpClient(
            timeout=timeout, max_answer=MAX_ANSWER, headers=user_agent, unpacks=False, route=route
        )
        base = url.rstrip("/")
        self._boot_auth = {True: f"{base}/bootAuth/kms", False: f"{base}/bootAuth/app"}

    async def decide(self, boot_info: BootInfo, *, is_kms: bool) -> Decision:
        """POST the request to bootAuth/kms or bootAuth/app."""
        body = boot_info.to_json(variant_members=self._variant_members)
        return _decision(await self._ask("POST", self._boot_auth[is_kms], body))

    async def info(self) -> AuthInfo:
        """GET the webhook's root."""
        answer = _Fields(await self._ask("GET", self.url), "AuthApiInfoResponse")
        answer.text("status")
        return AuthInfo(
            is_dev=False,
            gateway_app_id=answer.text("gatewayAppId"),
            kms_contract_address=answer.text("kmsContractAddr"),
            eth_rpc_url=answer.text("ethRpcUrl", "") or None,
            chain_id=answer.unsigned("chainId"),
            app_implementation=answer.text("appImplementation"),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def _ask(self, method: str, url: str, body: bytes | None = None) -> "_Answer":
        headers, shown_at = {} if body is None else dict(_JSON_TYPE), shown_url(url)
        if self._more_headers is not None:
            headers |= self._more_headers()
        try:
            answer = await self._client.send(method, url, body, headers)
        except AnswerTooLongError as error:
            raise UnavailableError(f"auth api {shown_at} answered more than {MAX_ANSWER} bytes") from error
        except NoAnswerError as error:
            raise UnavailableError(f"error sending request for url ({shown_at}): {error}") from error
        data, status = answer.body, answer.status
        shown = data[:SHOWN_BYTES].decode(errors="replace")
        if not 200 <= status < 300:
            raise UnavailableError(f"auth api {shown_at} returned {status_line(status)}: {shown}")
        return _Answer(f"failed to decode response from {shown_at}, status={status_line(status)}, body={shown}", data)


@dataclass(frozen=True, slots=True)
class _Answer:
    """A body that should be JSON, and the text of the error if it is not."""

    complaint: str
    data: bytes


def _decision(answer: _Answer) -> Decision:
    """Parse an answer; raise `UnavailableError` if it is not a decision."""
    fields = _Fields(answer, "BootResponse")
    return Decision(fields.boolean("isAllowed"), fields.text("reason"), fields.text("gatewayAppId"))


class _Fields:
    """Strictly typed reads from a JSON object; extra keys are ignored, a missing or mistyped one is an error."""

    def __init__(self, answer: _Answer, what: str) -> None:
        self._complaint = answer.complaint
        try:
            # Of the JSON that Python reads, no more than upstream's parser: UTF-8 without NaN, and no field twice.
            document = _JSON.parse(answer.data.decode())
        except ConstantError as error:
            raise UnavailableError(f"{self._complaint}: {error.constant} is no JSON") from error
        except ValueError as error:
            raise UnavailableError(f"{self._complaint}: {error}") from error
        if not isinstance(document, dict):
            raise UnavailableError(f"{self._complaint}: invalid type: {_kind(document)}, expected struct {what}")
        if any(map(has_lone_surrogate, document)):
            raise UnavailableError(f"{self._complaint}: lone surrogate in the name of a member, Unicode expected")
        self._document: dict[str, Any] = document

    def boolean(self, key: str) -> bool:
        value = self._get(key)
        if not isinstance(value, bool):
            raise self._mistyped(key, value, "a boolean")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._mistyped(key, value, "a string")
        if has_lone_surrogate(value):
            raise UnavailableError(f"{self._complaint}: lone surrogate in `{key}`, Unicode expected")
        return value

    def unsigned(self, key: str) -> int:
        value = self._get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**64:
            raise self._mistyped(key, value, "u64")
        return value

    def _get(self, key: str, default: Any = None) -> Any:
        if key in self._document:
            if self._document[key] is _TWICE:
                raise UnavailableError(f"{self._complaint}: duplicate field `{key}`")
            return self._document[key]
        if default is None:
            raise UnavailableError(f"{self._complaint}: missing field `{key}`")
        return default

    def _mistyped(self, key: str, value: Any, expected: str) -> UnavailableError:
        return UnavailableError(f"{self._complaint}: invalid type: {_kind(value)}, expected {expected} for `{key}`")


_TWICE: Final = object()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for key, value in pairs:
        document[key] = _TWICE if key in document else value
    return document


_JSON: Final = StrictJson(members=_object)


def _kind(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} `{value!r:.40}`"
