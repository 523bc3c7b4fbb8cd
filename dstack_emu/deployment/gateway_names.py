"""What the parts of a stack call its gateway, and the files of it that others read."""

from typing import Final

GATEWAY: Final = "gateway"
"""The name of its trust domain, and of the service of its RPCs."""
AGENT: Final = "agent-gateway"
"""The service of its agent."""
ADMIN: Final = "gateway-admin"
INGRESS: Final = "ingress"

CA_FILE: Final = "gateway/data/gateway-ca.crt"
"""The root certificate of what its ingress shows, in the state folder."""
