"""A TDX quote, version 4 or 5: header, TD report, signature data.

Layout: Intel TDX DCAP Quote Generation Library 4.0, appendix A.3; checked against `dcap-qvl` src/quote.rs and quotes of
real hardware. This module only encodes and parses. `attest.verify` verifies quotes with `dcap-qvl`, which
does not use this parser.
"""

import hashlib
import struct
from dataclasses import dataclass
from typing import Final, Self

from dstack_emu.attest.errors import FormatError

QE_VENDOR_ID: Final = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
TEE_TYPE_TDX: Final = 0x81
ATTESTATION_KEY_ECDSA_P256: Final = 2
CERTIFICATION_QE_REPORT: Final = 6
CERTIFICATION_PCK_CHAIN: Final = 5
MAX_QUOTE_SIZE: Final = 64 * 1024
"""The maximum size of a quote in bytes. Hardware's have about 5000, and up to 16 KiB with their padding."""
HEADER_SIZE: Final = 48
TD10_SIZE: Final = 584
TD15_SIZE: Final = 648
BODY_TD10, BODY_TD15 = 2, 3
QE_REPORT_SIZE: Final = 384

_HEADER = struct.Struct("<HHIHH16s20s")
_MR: Final = 48


@dataclass(frozen=True, slots=True)
class QuoteHeader:
    """48 bytes, little-endian: 0 version u16, 2 att_key_type u16, 4 tee_type u32, 8 qe_svn u16, 10 pce_svn u16,
    12 qe_vendor_id[16], 28 user_data[20]: in Intel's quotes the platform's id[16], then zeros.
    """

    version: int = 4
    attestation_key_type: int = ATTESTATION_KEY_ECDSA_P256
    tee_type: int = TEE_TYPE_TDX
    qe_svn: int = 0
    pce_svn: int = 0
    qe_vendor_id: bytes = QE_VENDOR_ID
    user_data: bytes = bytes(20)

    def encode(self) -> bytes:
        """Encode to 48 bytes."""
        return _HEADER.pack(
            self.version,
            self.attestation_key_type,
            self.tee_type,
            self.qe_svn,
            self.pce_svn,
            self.qe_vendor_id,
            self.user_data,
        )

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Parse 48 bytes."""
        return cls(*_HEADER.unpack(data))


@dataclass(frozen=True, slots=True)
class TdReport:
    """The TD report body (TD10), 584 bytes; offsets from the start of the quote.

    48 tee_tcb_svn[16], 64 mr_seam[48], 112 mr_signer_seam[48], 160 seam_attributes[8], 168 td_attributes[8],
    176 xfam[8], 184 mr_td[48], 232 mr_config_id[48], 280 mr_owner[48], 328 mr_owner_config[48],
    376/424/472/520 rt_mr0..3[48 each], 568 report_data[64].
    """

    tee_tcb_svn: bytes
    mr_seam: bytes
    mr_signer_seam: bytes
    seam_attributes: bytes
    td_attributes: bytes
    xfam: bytes
    mr_td: bytes
    mr_config_id: bytes
    mr_owner: bytes
    mr_owner_config: bytes
    rt_mr0: bytes
    rt_mr1: bytes
    rt_mr2: bytes
    rt_mr3: bytes
    report_data: bytes

    def encode(self) -> bytes:
        """Encode to 584 bytes; raise `FormatError`, which names the field with a wrong size."""
        parts = [getattr(self, name) for name, _ in TD10_FIELDS]
        body = b"".join(parts)
        if len(body) != TD10_SIZE:
            wrong = next(
                f"{name} is {len(part)} bytes, {size} expected"
                for (name, size), part in zip(TD10_FIELDS, parts, strict=True)
                if len(part) != size
            )
            raise FormatError(f"TD report: {wrong}")
        return body

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Parse 584 bytes."""
        return cls(*_TD10.unpack(data))

    @property
    def rtmrs(self) -> tuple[bytes, bytes, bytes, bytes]:
        """Return the four runtime measurement registers, 48 bytes each."""
        return self.rt_mr0, self.rt_mr1, self.rt_mr2, self.rt_mr3


TD10_FIELDS: Final = (
    ("tee_tcb_svn", 16),
    ("mr_seam", _MR),
    ("mr_signer_seam", _MR),
    ("seam_attributes", 8),
    ("td_attributes", 8),
    ("xfam", 8),
    ("mr_td", _MR),
    ("mr_config_id", _MR),
    ("mr_owner", _MR),
    ("mr_owner_config", _MR),
    ("rt_mr0", _MR),
    ("rt_mr1", _MR),
    ("rt_mr2", _MR),
    ("rt_mr3", _MR),
    ("report_data", 64),
)
_TD10: Final = struct.Struct("".join(f"{size}s" for _, size in TD10_FIELDS))


@dataclass(frozen=True, slots=True)
class TdReport15(TdReport):
    """The TD 1.5 report body (TD15), 648 bytes: TD10, then tee_tcb_svn2[16] and mr_service_td[48]. Version 5 only."""

    tee_tcb_svn2: bytes = bytes(16)
    mr_service_td: bytes = bytes(48)

    def encode(self) -> bytes:
        """Encode to 648 bytes."""
        tail = self.tee_tcb_svn2 + self.mr_service_td
        if len(tail) != TD15_SIZE - TD10_SIZE:
            raise FormatError(f"TD report: tee_tcb_svn2 and mr_service_td are {len(tail)} bytes, 64 expected")
        # Not super(): it does not work without arguments in a slotted dataclass, which is a new class.
        return TdReport.encode(self) + tail

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Parse 648 bytes."""
        base = TdReport.parse(data[:TD10_SIZE])
        return cls.of(base, data[TD10_SIZE : TD10_SIZE + 16], data[TD10_SIZE + 16 :])

    @classmethod
    def of(cls, base: TdReport, tee_tcb_svn2: bytes, mr_service_td: bytes = bytes(48)) -> Self:
        """Extend a TD10 report."""
        values = {name: getattr(base, name) for name, _ in TD10_FIELDS}
        return cls(**values, tee_tcb_svn2=tee_tcb_svn2, mr_service_td=mr_service_td)


def encode_body(report: TdReport, version: int) -> bytes:
    """Encode a report for a quote of that version; in version 5, body type (u16) and size (u32) precede it.

    Raises `FormatError` for another version, and for a TD15 report in version 4.
    """
    body = report.encode()
    is_td15 = isinstance(report, TdReport15)
    if version == 5:
        return struct.pack("<HI", BODY_TD15 if is_td15 else BODY_TD10, len(body)) + body
    if version != 4 or is_td15:
        raise FormatError(f"quote: version 4 (TD10) or 5 expected, got {version} with {type(report).__name__}")
    return body


@dataclass(frozen=True, slots=True)
class QuoteSignature:
    """The signature data of a quote: u32 length, then (in version 4 from offset 636):

    signature r, s[64] by the attestation key over header and body; attestation key X, Y[64]; u16 type 6, u32 size;
    QE report[384]; its signature r, s[64] by the PCK key; u16 size and QE authentication data; u16 type 5, u32 size and
    the PCK certificate chain in PEM, leaf first.

    The first type may be any number: nothing signs it, and dcap-qvl does not look at it.
    """

    signature: bytes
    attestation_key: bytes
    qe_report: bytes
    qe_report_signature: bytes
    qe_authentication_data: bytes
    pck_chain: bytes
    certification_type: int = CERTIFICATION_QE_REPORT

    def encode(self) -> bytes:
        """Encode with the leading u32 length."""
        certification = b"".join(
            (
                self.qe_report,
                self.qe_report_signature,
                struct.pack("<H", len(self.qe_authentication_data)),
                self.qe_authentication_data,
                struct.pack("<HI", CERTIFICATION_PCK_CHAIN, len(self.pck_chain)),
                self.pck_chain,
            )
        )
        data = b"".join(
            (
                self.signature,
                self.attestation_key,
                struct.pack("<HI", self.certification_type, len(certification)),
                certification,
            )
        )
        return struct.pack("<I", len(data)) + data

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Parse exactly the bytes after the u32 length; raise `FormatError` if bytes are missing or left over."""
        reader = _Reader(data, "quote signature data")
        signature, key = reader.take(64), reader.take(64)
        certification_type, size = struct.unpack("<HI", reader.take(6))
        inner = _Reader(reader.take(size), "quote certification data")
        reader.end()
        report, report_signature = inner.take(QE_REPORT_SIZE), inner.take(64)
        auth_data = inner.take(struct.unpack("<H", inner.take(2))[0])
        kind, size = struct.unpack("<HI", inner.take(6))
        if kind != CERTIFICATION_PCK_CHAIN:
            raise FormatError(
                f"quote certification data: type {CERTIFICATION_PCK_CHAIN} (PCK chain) expected, got {kind}"
            )
        chain = inner.take(size)
        inner.end()
        return cls(signature, key, report, report_signature, auth_data, chain, certification_type)


@dataclass(frozen=True, slots=True)
class Quote:
    """A quote: header, body, signature data, and the bytes after it (hardware adds padding, which verifiers accept)."""

    header: QuoteHeader
    report: TdReport
    signature: QuoteSignature
    trailing: bytes = b""

    def encode(self) -> bytes:
        """Encode to exactly the bytes that `parse` has read."""
        body = encode_body(self.report, self.header.version)
        return b"".join((self.header.encode(), body, self.signature.encode(), self.trailing))

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Parse a TDX quote of version 4 or 5; raise `FormatError` if it is another one or truncated."""
        require_size(data)
        reader = _Reader(data, "quote")
        header = QuoteHeader.parse(reader.take(HEADER_SIZE))
        if header.version not in (4, 5) or header.tee_type != TEE_TYPE_TDX:
            raise FormatError(
                f"quote: version 4 or 5 and TEE type {TEE_TYPE_TDX:#x} (TDX) expected, "
                f"got version {header.version} and TEE type {header.tee_type:#x}"
            )
        report = _read_report(reader) if header.version == 5 else TdReport.parse(reader.take(TD10_SIZE))
        size = struct.unpack("<I", reader.take(4))[0]
        return cls(header, report, QuoteSignature.parse(reader.take(size)), reader.rest())


def require_size(quote: bytes) -> None:
    """Raise `FormatError` if a quote has more than MAX_QUOTE_SIZE bytes."""
    if len(quote) > MAX_QUOTE_SIZE:
        raise FormatError(f"quote: at most {MAX_QUOTE_SIZE} bytes expected, got {len(quote)}")


def _read_report(reader: "_Reader") -> TdReport:
    """Read the typed body of a version 5 quote."""
    kind, size = struct.unpack("<HI", reader.take(6))
    if (kind, size) == (BODY_TD10, TD10_SIZE):
        return TdReport.parse(reader.take(size))
    if (kind, size) == (BODY_TD15, TD15_SIZE):
        return TdReport15.parse(reader.take(size))
    raise FormatError(
        f"quote: body type {BODY_TD10} of {TD10_SIZE} bytes or {BODY_TD15} of {TD15_SIZE} expected, "
        f"got type {kind} of {size}"
    )


def qe_report_data(attestation_key: bytes, qe_authentication_data: bytes) -> bytes:
    """Return a QE report's report_data: SHA-256 of attestation key and authentication data, then 32 zero bytes."""
    return hashlib.sha256(attestation_key + qe_authentication_data).digest().ljust(64, b"\0")


class _Reader:
    """Reads exact numbers of bytes; an error names what was read, and the offset."""

    __slots__ = ("data", "offset", "what")

    def __init__(self, data: bytes, what: str) -> None:
        self.data, self.offset, self.what = data, 0, what

    def take(self, size: int) -> bytes:
        end = self.offset + size
        if end > len(self.data):
            raise FormatError(
                f"{self.what}: {size} bytes expected at offset {self.offset}, got {len(self.data) - self.offset}"
            )
        piece = self.data[self.offset : end]
        self.offset = end
        return piece

    def rest(self) -> bytes:
        return self.data[self.offset :]

    def end(self) -> None:
        if self.offset != len(self.data):
            raise FormatError(f"{self.what}: {len(self.data) - self.offset} bytes left over")
