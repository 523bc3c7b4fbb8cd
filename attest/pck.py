"""The SGX extension of a PCK certificate: which platform, at which security versions.

OID 1.2.840.113741.1.13.1, not critical, a SEQUENCE of {OID, value}. Source: Intel PCK Certificate and CRL Profile
Specification 1.5, section 1.3.5.
"""

import hashlib
from dataclasses import dataclass
from typing import Final

from cryptography import x509

from attest import der

SGX_EXTENSION: Final = "1.2.840.113741.1.13.1"
OID_SGX_EXTENSION: Final = x509.ObjectIdentifier(SGX_EXTENSION)
TCB_COMPONENTS: Final = 16


@dataclass(frozen=True, slots=True)
class PckExtension:
    """Sizes: ppid 16, cpu_svn 16 (the component SVNs), pce_id 2, fmspc 6, platform_instance_id 16 bytes."""

    ppid: bytes
    cpu_svn: bytes
    pce_svn: int
    pce_id: bytes
    fmspc: bytes
    platform_instance_id: bytes

    def encode(self) -> bytes:
        """Encode the extension's value."""
        tcb = der.sequence(
            *(_entry(f"2.{i}", der.integer(svn)) for i, svn in enumerate(self.cpu_svn, 1)),
            _entry(f"2.{TCB_COMPONENTS + 1}", der.integer(self.pce_svn)),
            _entry(f"2.{TCB_COMPONENTS + 2}", der.octet_string(self.cpu_svn)),
        )
        configuration = der.sequence(
            *(_entry(f"7.{i}", der.boolean(flag)) for i, flag in ((1, True), (2, False), (3, True)))
        )
        return der.sequence(
            _entry("1", der.octet_string(self.ppid)),
            _entry("2", tcb),
            _entry("3", der.octet_string(self.pce_id)),
            _entry("4", der.octet_string(self.fmspc)),
            _entry("5", der.integer(1, der.ENUMERATED)),  # SGXType: scalable, as TDX platforms are
            _entry("6", der.octet_string(self.platform_instance_id)),
            _entry("7", configuration),
        )


def device_id(ppid: bytes) -> bytes:
    """What dstack calls a platform: SHA-256 of its 16-byte PPID."""
    return hashlib.sha256(ppid).digest()


def _entry(suffix: str, value: bytes) -> bytes:
    return der.sequence(der.oid(f"{SGX_EXTENSION}.{suffix}"), value)
