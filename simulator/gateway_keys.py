"""What a guest has of its gateways, as data: keys, certificates, and a WireGuard configuration.

Formats: `gateway-cache.json` and `dstack-wg0.conf` of dstack `dstack-util/src/system_setup.rs` at 312dc605.
"""

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class GatewayKeys:
    """What a guest shows to gateways: the members of its gateway-cache.json.

    Chains and the key are PEM, the leaf first. `client_cert_with_quote` is for gateways before 0.5.6.
    `cert_not_after` is in Unix seconds. `wg_sk` and `wg_pk` are a WireGuard key pair, 32 bytes each in base64.
    """

    client_cert: str
    client_cert_with_quote: str
    client_key: str
    cert_not_after: int
    wg_sk: str
    wg_pk: str

    def to_json(self) -> str:
        """Return the content of the file."""
        return json.dumps(asdict(self), separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class Registration:
    """What a guest has of its gateways: its keys, and its WireGuard configuration, empty before it is registered."""

    keys: GatewayKeys | None = None
    configuration: str = ""
