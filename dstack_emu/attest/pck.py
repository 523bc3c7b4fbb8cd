"""The SGX extension of a PCK certificate: which platform, at which security versions.

OID 1.2.840.113741.1.13.1, not critical, a SEQUENCE of {OID, value}. Parsing it does not verify the certificate:
`attest.verify` verifies the chain of a quote. Source: Intel PCK Certificate and CRL Profile Specification 1.5, section
1.3.5.
"""

import hashlib
from dataclasses import dataclass
from typing import Final, Self

from cryptography import x509

from dstack_emu.attest import der
from dstack_emu.attest.certificate import UNREADABLE
from dstack_emu.attest.errors import FormatError

SGX_EXTENSION: Final = "1.2.840.113741.1.13.1"
OID_SGX_EXTENSION: Final = x509.ObjectIdentifier(SGX_EXTENSION)
TCB_COMPONENTS: Final = 16
MAX_ENTRIES: Final = 64
"""The maximum number of entries of a sequence; the longest, of the TCB, has 18."""
SGX_TYPES: Final = ("standard", "scalable", "scalable with integrity")
"""Names of `sgx_type`; TDX platforms are scalable (1)."""

_CONFIGURATION: Final = (("7.1", "dynamic_platform"), ("7.2", "cached_keys"), ("7.3", "smt_enabled"))


@dataclass(frozen=True, slots=True)
class PckExtension:
    """Sizes: ppid 16, cpu_svn 16 (the component SVNs), pce_id 2, fmspc 6, platform_instance_id 16 bytes.

    A certificate of the processor CA has neither an instance id (empty here) nor flags; a flag that it does not have is
    None. `component_svns` is set only where sixteen component SVNs are there and are not the bytes of `cpu_svn`.
    """

    ppid: bytes
    cpu_svn: bytes
    pce_svn: int
    pce_id: bytes
    fmspc: bytes
    platform_instance_id: bytes
    sgx_type: int = 1
    dynamic_platform: bool | None = True
    cached_keys: bool | None = False
    smt_enabled: bool | None = True
    component_svns: bytes = b""

    def encode(self) -> bytes:
        """Encode the extension's value."""
        components = self.component_svns or self.cpu_svn
        tcb = der.sequence(
            *(_entry(f"2.{i}", der.integer(svn)) for i, svn in enumerate(components, 1)),
            _entry(f"2.{TCB_COMPONENTS + 1}", der.integer(self.pce_svn)),
            _entry(f"2.{TCB_COMPONENTS + 2}", der.octet_string(self.cpu_svn)),
        )
        entries = [
            _entry("1", der.octet_string(self.ppid)),
            _entry("2", tcb),
            _entry("3", der.octet_string(self.pce_id)),
            _entry("4", der.octet_string(self.fmspc)),
            _entry("5", der.integer(self.sgx_type, der.ENUMERATED)),
        ]
        if self.platform_instance_id:
            entries.append(_entry("6", der.octet_string(self.platform_instance_id)))
        flags = [(suffix, getattr(self, name)) for suffix, name in _CONFIGURATION]
        if configuration := [_entry(suffix, der.boolean(flag)) for suffix, flag in flags if flag is not None]:
            entries.append(_entry("7", der.sequence(*configuration)))
        return der.sequence(*entries)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Parse the extension's value; raise `FormatError`, which names the missing, repeated or malformed entry.

        Entries may have any order, and unknown ones are ignored, because Intel may extend the format. Component
        SVNs may be absent, as in certificates of upstream's mock platform: TCB matching does not use them.
        """
        top = _Entries(data, "SGX extension")
        tcb = _Entries(top.value("2"), "SGX extension TCB")
        cpu_svn = tcb.octets(f"2.{TCB_COMPONENTS + 2}", TCB_COMPONENTS)
        numbers = range(1, TCB_COMPONENTS + 1) if tcb.has("2.1") else ()
        components = bytes(tcb.integer(f"2.{i}", 0xFF) for i in numbers)
        configuration = _Entries(top.value("7"), "SGX extension configuration") if top.has("7") else None
        flags = {name: None if configuration is None else configuration.flag(key) for key, name in _CONFIGURATION}
        return cls(
            ppid=top.octets("1", 16),
            cpu_svn=cpu_svn,
            pce_svn=tcb.integer(f"2.{TCB_COMPONENTS + 1}", 0xFFFF),
            pce_id=top.octets("3", 2),
            fmspc=top.octets("4", 6),
            platform_instance_id=top.octets("6", 16) if top.has("6") else b"",
            sgx_type=top.integer("5", 0xFF, der.ENUMERATED),
            component_svns=b"" if components == cpu_svn else components,
            **flags,
        )


def pck_extension_of(certificate: x509.Certificate) -> PckExtension:
    """Read the SGX extension of a PCK certificate; raise `FormatError` if there is none or it is malformed."""
    try:
        value = certificate.extensions.get_extension_for_oid(OID_SGX_EXTENSION).value
    except (x509.ExtensionNotFound, *UNREADABLE) as error:
        raise FormatError(f"PCK certificate: one SGX extension expected ({error})") from error
    if not isinstance(value, x509.UnrecognizedExtension):
        raise FormatError(f"PCK certificate: raw SGX extension expected, got {type(value).__name__}")
    return PckExtension.parse(value.value)


def device_id(ppid: bytes) -> bytes:
    """Return dstack's id of a platform: the SHA-256 of its 16-byte PPID."""
    return hashlib.sha256(ppid).digest()


def _oid(suffix: str) -> bytes:
    return der.oid(f"{SGX_EXTENSION}.{suffix}")


def _entry(suffix: str, value: bytes) -> bytes:
    return der.sequence(_oid(suffix), value)


class _Entries:
    """A SEQUENCE of {OID, value}, by the part of the OID after that of the extension; values are DER."""

    __slots__ = ("_values", "_what")

    def __init__(self, data: bytes, what: str) -> None:
        self._what, self._values = what, dict[bytes, bytes]()
        content, rest = der.read(data, der.SEQUENCE, what)
        _require_end(rest, what)
        while content:
            if len(self._values) == MAX_ENTRIES:
                raise FormatError(f"{what}: at most {MAX_ENTRIES} entries expected, got more")
            entry, content = der.read(content, der.SEQUENCE, f"{what}: entry")
            content_of_oid, value = der.read(entry, der.OID, f"{what}: OID")
            oid = der.tlv(der.OID, content_of_oid)
            if oid in self._values:
                raise FormatError(f"{what}: each OID once expected, got {oid.hex():.40} again")
            self._values[oid] = value

    def has(self, suffix: str) -> bool:
        return _oid(suffix) in self._values

    def value(self, suffix: str) -> bytes:
        value = self._values.get(_oid(suffix))
        if value is None:
            raise FormatError(f"{self._what}: {SGX_EXTENSION}.{suffix} expected, got none")
        return value

    def octets(self, suffix: str, size: int) -> bytes:
        octets = self._content(suffix, der.OCTET_STRING)
        if len(octets) != size:
            raise FormatError(f"{self._what}: {SGX_EXTENSION}.{suffix}: {size} bytes expected, got {len(octets)}")
        return octets

    def integer(self, suffix: str, most: int, tag: int = der.INTEGER) -> int:
        content = self._content(suffix, tag)
        number = int.from_bytes(content, "big", signed=True)
        if not content or not 0 <= number <= most:
            got = f"{number}" if len(content) in range(1, 9) else f"{len(content)} bytes"
            raise FormatError(f"{self._what}: {SGX_EXTENSION}.{suffix}: 0 to {most} expected, got {got}")
        return number

    def flag(self, suffix: str) -> bool | None:
        if not self.has(suffix):
            return None
        content = self._content(suffix, der.BOOLEAN)
        if content not in (b"\x00", b"\xff"):
            raise FormatError(f"{self._what}: {SGX_EXTENSION}.{suffix}: DER boolean expected, got {content.hex():.16}")
        return content == b"\xff"

    def _content(self, suffix: str, tag: int) -> bytes:
        what = f"{self._what}: {SGX_EXTENSION}.{suffix}"
        content, rest = der.read(self.value(suffix), tag, what)
        _require_end(rest, what)
        return content


def _require_end(rest: bytes, what: str) -> None:
    if rest:
        raise FormatError(f"{what}: {len(rest)} bytes left over")
