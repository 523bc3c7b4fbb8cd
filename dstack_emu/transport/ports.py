"""The default ports of the emulator's services, in one table, so that no two are equal.

The ports of the two KMS, their webhooks and agents are those of the authorization runbook, so that its commands work
unchanged.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

CHAIN_PORT: Final = 8545
"""The port of a chain, which upstream's webhooks ask if they are told no other."""

PORTS: Final[Mapping[str, int]] = MappingProxyType(
    {
        "pccs": 8081,
        "auth-src": 3101,
        "auth-dst": 3102,
        "agent-src": 8091,
        "agent-dst": 8092,
        "kms-src": 9301,
        "kms-dst": 9302,
        "app": 8090,
        "verifier": 8088,
        "control": 8070,
        "vmm": 8085,
        "gateway": 8010,
        "gateway-admin": 8011,
        "ingress": 8443,
        "agent-gateway": 8093,
        "chain": CHAIN_PORT,
    }
)
"""The services in the order in which they are bound, and their ports."""

GRPC_PORTS: Final[Mapping[str, int]] = MappingProxyType(
    {
        "agent-src-grpc": 8191,
        "agent-dst-grpc": 8192,
        "kms-src-grpc": 9311,
        "kms-src-grpc-mtls": 9321,
        "kms-dst-grpc": 9312,
        "kms-dst-grpc-mtls": 9322,
        "app-grpc": 8190,
    }
)
"""The gRPC listeners, which exist only if gRPC is enabled."""

IMAGE_PORT: Final = 8089
"""The port of `dstack-emu image serve`."""
IMAGE_URL: Final = f"http://127.0.0.1:{IMAGE_PORT}/mr_{{OS_IMAGE_HASH}}.tar.gz"
"""The URL from which images of the legacy variant are downloaded; the lite variant needs no download."""
