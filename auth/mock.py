"""auth-mock: a webhook that decides by a fixed policy, whatever was measured. The service; no HTTP.

For tests only: its default allows everything. An unknown policy ends it at its start, as in 0.6; before, upstream
warned and allowed everything. One difference from upstream remains: a chain id that is not a number ends it too, for
which upstream answers `null`.

Source: `kms/auth-mock/index.ts` of dstack, release/v0.5.x 40eaf35e, next 312dc605 (which added the refusal to run
in production) and 1a0afc5e (which added the refusal of an unknown policy).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, get_args

from dstack_emu.auth.boot_info import PolicyDecision, ReceivedBootInfo
from dstack_emu.auth.errors import AuthConfigError

MockPolicy = Literal["allow-all", "deny-all", "deny-kms", "deny-app", "allowlist-device", "allowlist-mr"]
MOCK_POLICIES: Final[tuple[MockPolicy, ...]] = get_args(MockPolicy)


@dataclass(frozen=True, slots=True)
class MockSettings:
    """What auth-mock takes from its environment, except the port: the caller binds the socket.

    The two allowlists hold lowercase text and are matched against the boot info's value without its `0x`: an
    entry that begins with `0x` matches nothing, as upstream.
    """

    policy: MockPolicy = "allow-all"
    allowed_device_ids: frozenset[str] = frozenset()
    allowed_mr_aggregated: frozenset[str] = frozenset()
    kms_contract_addr: str = "0xmockcontract1234567890123456789012345678"
    eth_rpc_url: str = ""
    gateway_app_id: str = "0xmockgateway1234567890123456789012345678"
    chain_id: int = 1337
    app_implementation: str = "0xmockapp9876543210987654321098765432109"

    def __post_init__(self) -> None:
        _parse_policy(self.policy)

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> "MockSettings":
        """Read the MOCK_ variables, KMS_CONTRACT_ADDR and ETH_RPC_URL; an empty value is an absent one.

        Raises `AuthConfigError` for an unknown policy, a chain id that is not a number, or NODE_ENV `production`.
        """
        if env.get("NODE_ENV") == "production":
            raise AuthConfigError("auth-mock must not run with NODE_ENV=production")
        default = cls()
        return cls(
            policy=_parse_policy(env.get("MOCK_POLICY") or default.policy),
            allowed_device_ids=_parse_list(env.get("MOCK_ALLOWED_DEVICE_IDS", "")),
            allowed_mr_aggregated=_parse_list(env.get("MOCK_ALLOWED_MR_AGGREGATED", "")),
            kms_contract_addr=env.get("KMS_CONTRACT_ADDR") or default.kms_contract_addr,
            eth_rpc_url=env.get("ETH_RPC_URL", ""),
            gateway_app_id=env.get("MOCK_GATEWAY_APP_ID") or default.gateway_app_id,
            chain_id=_parse_chain_id(env.get("MOCK_CHAIN_ID") or str(default.chain_id)),
            app_implementation=env.get("MOCK_APP_IMPLEMENTATION") or default.app_implementation,
        )


class MockAuth:
    """Decides by the policy of its settings."""

    def __init__(self, settings: MockSettings) -> None:
        self._settings = settings

    def decide(self, boot_info: ReceivedBootInfo, is_kms: bool) -> PolicyDecision:
        """Decide by the policy alone; a denial names no gateway."""
        caller = "KMS" if is_kms else "app"
        match self._settings.policy:
            case "allow-all":
                return self._allow(f"mock {caller} always allowed")
            case "deny-all":
                return self._deny("mock policy: deny-all")
            case "deny-kms" if is_kms:
                return self._deny("mock policy: deny-kms")
            case "deny-app" if not is_kms:
                return self._deny("mock policy: deny-app")
            case "deny-kms" | "deny-app" as policy:
                return self._allow(f"mock {caller} allowed ({policy} policy)")
            case "allowlist-device":
                allowed = self._settings.allowed_device_ids
                return self._by_list(allowed, "device", boot_info.device_id)
            case "allowlist-mr":
                allowed = self._settings.allowed_mr_aggregated
                return self._by_list(allowed, "mrAggregated", boot_info.mr_aggregated)

    def info(self) -> dict[str, object]:
        """Build the answer of `GET /`; the member `note` is upstream's, whatever the policy is."""
        return {
            "status": "ok",
            "kmsContractAddr": self._settings.kms_contract_addr,
            "ethRpcUrl": self._settings.eth_rpc_url,
            "gatewayAppId": self._settings.gateway_app_id,
            "chainId": self._settings.chain_id,
            "appAuthImplementation": self._settings.app_implementation,
            "appImplementation": self._settings.app_implementation,
            "note": "this is a mock backend - all authentications will succeed",
        }

    def _by_list(self, allowed: frozenset[str], name: str, value: str) -> PolicyDecision:
        if not allowed:
            return self._deny(f"mock policy: {self._settings.policy} with empty list")
        if value.lower().removeprefix("0x") not in allowed:
            return self._deny(f"mock policy: {name} {value} not in allowlist")
        return self._allow(f"mock policy: {name} {value} allowed")

    def _allow(self, reason: str) -> PolicyDecision:
        return PolicyDecision(True, reason, self._settings.gateway_app_id, rule=self._settings.policy)

    def _deny(self, reason: str) -> PolicyDecision:
        return PolicyDecision(False, reason, "", rule=self._settings.policy)


def _parse_policy(text: str) -> MockPolicy:
    for policy in MOCK_POLICIES:
        if policy == text:
            return policy
    raise AuthConfigError(f'unknown MOCK_POLICY "{text}"')


def _parse_list(text: str) -> frozenset[str]:
    return frozenset(filter(None, (entry.strip().lower() for entry in text.split(","))))


def _parse_chain_id(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 20 and int(text) < 2**64):
        raise AuthConfigError(f'MOCK_CHAIN_ID is "{text}", expected a decimal number below 2^64')
    return int(text)
