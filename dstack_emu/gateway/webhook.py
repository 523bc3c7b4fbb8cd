"""The webhook that is asked for each registration, if `core.auth` is enabled: any answer but 2xx refuses.

Source: dstack `gateway/src/main_service/auth_client.rs` at 312dc605.
"""

import json
from typing import Any, Final

from dstack_emu.attest.app_info import AppInfo
from dstack_emu.gateway.config import AuthSection
from dstack_emu.gateway.errors import GatewayError
from dstack_emu.transport.client import MoreHeaders
from dstack_emu.transport.failures import AnswerTooLongError, NoAnswerError, NoAnswerInTimeError
from dstack_emu.transport.http_client import HttpClient
from dstack_emu.transport.status import status_line
from dstack_emu.transport.urls import shown_url

MAX_ANSWER: Final = 1024 * 1024
_HEX: Final = (
    "app_id",
    "compose_hash",
    "instance_id",
    "device_id",
    "mr_system",
    "mr_aggregated",
    "os_image_hash",
    "key_provider_info",
)


class Webhook:
    """Asks whether an app may register. Close it."""

    def __init__(self, config: AuthSection, headers: MoreHeaders | None = None) -> None:
        self._config, self._headers = config, headers
        self._client = HttpClient(timeout=config.timeout, max_answer=MAX_ANSWER)

    async def require_authorized(self, info: AppInfo) -> None:
        """Raise `GatewayError` unless the webhook allows, or none is configured."""
        if not self._config.enabled:
            return
        url = self._config.url
        headers = {"Content-Type": "application/json", **(self._headers() if self._headers is not None else {})}
        try:
            answer = await self._client.send("POST", url, request_of(info), headers)
        except NoAnswerInTimeError as error:
            raise GatewayError("App authorization failed: Auth timeout: deadline has elapsed") from error
        except (NoAnswerError, AnswerTooLongError) as error:
            raise GatewayError(
                f"App authorization failed: Failed to send request: error sending request for url "
                f"({shown_url(url)}): {error}"
            ) from error
        if answer.status >= 400:
            kind = "client" if answer.status < 500 else "server"
            raise GatewayError(
                f"App authorization failed: Request failed: HTTP status {kind} error ({status_line(answer.status)}) "
                f"for url ({shown_url(url)})"
            )
        if not 200 <= answer.status < 300:
            raise GatewayError(f"App authorization failed: Request failed: {status_line(answer.status)}")

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()


def request_of(info: AppInfo) -> bytes:
    """Encode the request: app info in JSON, with bytes in hex."""
    document: dict[str, Any] = {name: getattr(info, name).hex() for name in _HEX}
    document["init_script_hashes"] = [each.hex() for each in info.init_script_hashes]
    return json.dumps(document, separators=(",", ":")).encode()
