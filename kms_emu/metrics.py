"""The two counters that upstream's KMS exposes: attestation requests, and those that failed.

Source: dstack `kms/src/main.rs` (`record_attestation_metrics`) at 312dc605.
"""

from typing import Final

from dstack_emu.attest.prpc import trim_prefix
from dstack_emu.transport.http import Request, Response

COUNTED: Final = frozenset(("GetAppKey", "GetKmsKey", "SignCert"))


class AttestationMetrics:
    """Counts the calls that verify evidence, and those of them that were refused."""

    def __init__(self) -> None:
        self.requests = self.failures = 0

    def record(self, method: str, refused: bool) -> None:
        """Count one call, whichever way it came, if it is one that counts."""
        if trim_prefix(method, "KMS.") in COUNTED:
            self.requests += 1
            self.failures += refused

    async def render(self, _request: Request) -> Response:
        """Answer in Prometheus' text format."""
        name = "dstack_kms_attestation"
        return Response.of(
            f"# HELP {name}_requests_total Total number of KMS attestation requests.\n"
            f"# TYPE {name}_requests_total counter\n{name}_requests_total {self.requests}\n"
            f"# HELP {name}_failures_total Total number of failed KMS attestation requests.\n"
            f"# TYPE {name}_failures_total counter\n{name}_failures_total {self.failures}\n",
            "text/plain",
        )
