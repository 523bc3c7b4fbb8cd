"""The verifier: is this evidence of a dstack guest, of which app, on which OS image?

It makes the same checks as a KMS before it releases keys, by the same code: `AttestationVerifier` for the quote and the
runtime events, `ImageStore` for the image. No webhook is involved: the reader of the answer decides, by its
`boot_info`.

Not here: sockets (`verifier.server`), where collateral and images come from (the caller's), ACPI tables and the
register-by-register comparison of upstream's `debug` (there is no QEMU).

Source of truth: dstack `verifier/src/{main,types,verification}.rs` at 312dc605, and recorded answers of that program.
"""

import binascii
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from dstack_emu.attest.app_info import TEE_VARIANT_TDX, AppInfo, require_same_config
from dstack_emu.attest.attestation import Attestation, decode, from_quote_and_log
from dstack_emu.attest.certificate import attestation_of, certificate_spki, load_der
from dstack_emu.attest.errors import AttestError, FormatError
from dstack_emu.attest.os_image import ImageInfo, decode_vm_config
from dstack_emu.attest.quote import TdReport
from dstack_emu.attest.release import DEFAULT, Release
from dstack_emu.attest.strict_json import ConstantError, DuplicateMemberError, StrictJson, TooManyValuesError, read_json
from dstack_emu.attest.verify import VerifiedAttestation
from dstack_emu.transport.aside import run_aside
from dstack_emu.transport.image_store import ImageStore
from dstack_emu.transport.pccs_client import AttestationVerifier, Clock

_JSON: Final = StrictJson()


class RequestSyntaxError(Exception):
    """The request is not JSON."""


class RequestTypeError(Exception):
    """The request is JSON, but has wrong members."""


class RequestTooLargeError(Exception):
    """The request has more JSON values than the verifier takes; the text has the bound."""


class InputError(Exception):
    """Evidence cannot be parsed: the outer text is the answer over HTTP, the command also prints the cause."""

    def __init__(self, outer: str, cause: Exception | None = None) -> None:
        super().__init__(outer if cause is None else f"{outer}: {cause}")
        self.outer = outer


@dataclass(frozen=True, slots=True)
class VerificationRequest:
    """What to verify: an attestation, or a quote with its event log (JSON text) and VM config. All of it may be absent.

    Beside an attestation the others do not count: nothing that was not quoted may change its verdict. A VM config that
    differs from the attestation's is refused by a verifier whose release demands that they match.
    """

    attestation: bytes | None = None
    quote: bytes | None = None
    event_log: str | None = None
    vm_config: str | None = None
    debug: bool | None = None

    @property
    def size(self) -> int:
        """Return how much has to be decoded: bytes and characters."""
        return sum(len(part or b"") for part in (self.attestation, self.quote, self.event_log))

    @classmethod
    def parse(cls, body: bytes, *, takes_log_as_list: bool = False) -> Self:
        """Read the JSON. Unknown members are ignored.

        Raises `RequestSyntaxError`, `RequestTypeError` or `RequestTooLargeError`.

        With `takes_log_as_list` the event log may also be a list, as `dstack-emu quote --json` writes it.
        """
        try:
            document = _JSON.parse(body.decode())
        except DuplicateMemberError as error:
            raise RequestTypeError("a member is named twice") from error
        except TooManyValuesError as error:
            raise RequestTooLargeError(str(error)) from error
        except ConstantError as error:
            raise RequestSyntaxError(f"expected value, got {error.constant}") from error
        except ValueError as error:
            raise RequestSyntaxError(str(error)) from error
        if not isinstance(document, dict):
            raise RequestTypeError(f"object expected, got {type(document).__name__}")
        return cls(
            _octets(document, "attestation"),
            _octets(document, "quote"),
            _event_log(document, takes_log_as_list),
            _member(document, "vm_config", str),
            _member(document, "debug", bool),
        )

    def evidence(self) -> tuple[Attestation, str]:
        """Return the evidence, and the VM config that overrides its own; raise InputError."""
        if self.attestation is not None:
            try:
                return decode(self.attestation), ""
            except FormatError as error:
                raise InputError("Failed to decode attestaion", error) from error  # the misspelling is upstream's
        if self.quote is None:
            raise InputError("Quote is required")
        if self.event_log is None:
            raise InputError("Event log is required")
        try:
            return from_quote_and_log(self.quote, self.event_log.encode()), self.vm_config or ""
        except (FormatError, UnicodeEncodeError) as error:
            raise InputError("Failed to create attestation", error) from error


@dataclass(slots=True)
class Details:
    """The results so far, in the order of the answer's members."""

    quote_verified: bool = False
    event_log_verified: bool = False
    os_image_hash_verified: bool = False
    acpi_tables_verified: bool = False
    os_image_is_dev: bool | None = None
    os_image_version: str | None = None
    tee_variant: str | None = None
    report_data: str | None = None
    tcb_status: str | None = None
    advisory_ids: list[str] = field(default_factory=list)
    key_provider: dict[str, str] | None = None
    app_info: dict[str, Any] | None = None
    boot_info: dict[str, Any] | None = None

    def record_image(self, info: ImageInfo) -> None:
        """Record the metadata of a downloaded image."""
        self.os_image_is_dev, self.os_image_version = info.is_dev, info.version or None


@dataclass(frozen=True, slots=True)
class VerificationResponse:
    """The answer: whether the evidence is valid, the results, and the reason if it is not valid."""

    is_valid: bool
    details: Details = field(default_factory=Details)
    reason: str | None = None

    @classmethod
    def internal_error(cls, text: str) -> Self:
        """Return the answer for evidence that could not be verified."""
        return cls(False, reason=f"Internal error: {text}")

    def to_document(self) -> dict[str, Any]:
        """Return the JSON object; boot_info is absent if nothing is known."""
        details = asdict(self.details)
        if details["boot_info"] is None:
            del details["boot_info"]
        return {"is_valid": self.is_valid, "details": details, "reason": self.reason}


class Verifier:
    """Verifies requests as a dstack release does, with one PCCS and root, and one cache of images."""

    def __init__(self, evidence: AttestationVerifier, images: ImageStore, release: Release = DEFAULT) -> None:
        self._evidence, self._images, self._release = evidence, images, release

    async def verify(self, request: VerificationRequest) -> VerificationResponse:
        """Verify the quote and its runtime events, then the OS image, then the identity; raise `InputError`."""
        attestation, vm_config = await run_aside(request.size, request.evidence)
        details = Details()
        try:
            verified = await self._evidence.verify(attestation)
        except AttestError as error:
            return VerificationResponse(False, details, f"Quote verification failed: {error}")
        details.quote_verified = True
        details.tee_variant = TEE_VARIANT_TDX
        details.tcb_status = verified.quote.tcb_status or None
        details.advisory_ids = list(verified.quote.advisory_ids)
        details.report_data = attestation.report_data.hex()
        try:
            if self._release.vm_config_must_match:
                vm_config = require_same_config(request.vm_config or "", attestation.config)
            verdict = await self._images.verify(verified, vm_config, on_image=details.record_image)
        except AttestError as error:
            return VerificationResponse(False, details, f"OS image hash verification failed: {error}")
        details.os_image_hash_verified = True
        details.acpi_tables_verified = verdict.acpi_tables_verified or self._release.lite_acpi_tables_verified
        try:
            info, boot_info = verified.app_info(vm_config=vm_config), verified.boot_info(vm_config=vm_config)
        except AttestError as error:
            return VerificationResponse(False, details, f"Event log verification failed: {error}")
        details.event_log_verified = True
        details.key_provider = _key_provider(info.key_provider_info)
        details.app_info = _app_info(info, verified.quote.report)
        details.boot_info = json.loads(boot_info.to_json(variant_members=("teeVariant",)))
        return VerificationResponse(True, details)

    async def verify_certificate(self, data: bytes, clock: Clock) -> dict[str, Any]:
        """Verify a self-signed RA-TLS certificate (PEM or DER): its profile, its evidence, the binding to its key.

        Raise AttestError. The image of the legacy variant is not downloaded for it, and counts as not verified.
        """
        certificate = _load_certificate(data)
        require_profile(certificate, clock())
        try:
            attestation, spki = attestation_of(certificate), certificate_spki(certificate)
            if attestation is None:
                raise FormatError("RA-TLS attestation extension missing")
            try:
                verified = await self._evidence.verify_bound(attestation, spki)
            except AttestError as error:
                raise FormatError(f"RA-TLS attestation verification failed: {error}") from error
        except AttestError as error:
            raise FormatError(f"failed to verify RA-TLS certificate: {error}") from error
        app_info: dict[str, Any] | None = None
        try:
            app_info = {name: value.hex() for name, value in asdict(verified.app_info()).items() if name in _OF_CERT}
            app_info["os_image_hash_verified"] = await self._has_image(verified)
        except AttestError:
            app_info = None
        return {
            "is_valid": True,
            "details": {
                "tee_variant": TEE_VARIANT_TDX,
                "report_data": attestation.report_data.hex(),
                "public_key_der": spki.hex(),
                "app_info": app_info,
            },
        }

    async def _has_image(self, verified: VerifiedAttestation) -> bool:
        try:
            if decode_vm_config(verified.attestation.config).tdx_attestation_variant == "legacy":
                return False
            await self._images.verify(verified)
        except AttestError:
            return False
        return True


_OF_CERT: Final = (
    "app_id",
    "compose_hash",
    "instance_id",
    "device_id",
    "mr_system",
    "mr_aggregated",
    "os_image_hash",
    "key_provider_info",
)


def require_profile(certificate: x509.Certificate, now: int) -> None:
    """Verify that a server or client could use a certificate; raise `FormatError`, in upstream's order.

    It must be signed by its own key, valid now, for digital signatures, for TLS, and name whom it is for.
    """
    try:
        certificate.verify_directly_issued_by(certificate)
    except (InvalidSignature, ValueError, TypeError) as error:
        raise FormatError("certificate self-signature verification failed") from error
    if not certificate.not_valid_before_utc.timestamp() <= now <= certificate.not_valid_after_utc.timestamp():
        raise FormatError("certificate is outside its validity period")
    if not _extension(certificate, x509.KeyUsage, "key usage").digital_signature:
        raise FormatError("certificate key usage does not permit digital signatures")
    purposes = set(_extension(certificate, x509.ExtendedKeyUsage, "extended key usage"))
    if not purposes & {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}:
        raise FormatError("certificate extended key usage permits neither server nor client authentication")
    if not list(_extension(certificate, x509.SubjectAlternativeName, "SAN")):
        raise FormatError("certificate SAN extension is empty")


def _extension(certificate: x509.Certificate, kind: type[Any], name: str) -> Any:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound as error:
        raise FormatError(f"certificate {name} extension missing") from error
    except ValueError as error:
        raise FormatError(f"failed to decode certificate {name}: {error}") from error


def _load_certificate(data: bytes) -> x509.Certificate:
    if not data.startswith(b"-----BEGIN"):
        try:
            return load_der(data)
        except FormatError as error:
            raise FormatError(f"failed to parse X.509 certificate: {error}") from error
    try:
        return load_der(x509.load_pem_x509_certificate(data).public_bytes(Encoding.DER))
    except ValueError as error:
        raise FormatError(f"failed to parse PEM certificate: {error}") from error


def _app_info(info: AppInfo, report: TdReport) -> dict[str, Any]:
    """Return the identity as upstream's code writes it, and the registers that its README documents."""
    registers = dict(zip(("mrtd", "rtmr0", "rtmr1", "rtmr2", "rtmr3"), (report.mr_td, *report.rtmrs), strict=True))
    return {
        "app_id": info.app_id.hex(),
        "compose_hash": info.compose_hash.hex(),
        "instance_id": info.instance_id.hex(),
        "device_id": info.device_id.hex(),
        **{name: value.hex() for name, value in registers.items()},
        "mr_system": info.mr_system.hex(),
        "mr_aggregated": info.mr_aggregated.hex(),
        "os_image_hash": info.os_image_hash.hex(),
        "key_provider_info": info.key_provider_info.hex(),
        "init_script_hashes": [pin.hex() for pin in info.init_script_hashes],
    }


def _key_provider(payload: bytes) -> dict[str, str] | None:
    try:
        document = read_json(payload)
        name, identity = document["name"], document["id"]
    except (ValueError, KeyError, TypeError):
        return None
    return {"name": name, "id": identity} if isinstance(name, str) and isinstance(identity, str) else None


def _member(document: dict[str, Any], name: str, kind: type) -> Any:
    value = document.get(name)
    if value is not None and type(value) is not kind:
        raise RequestTypeError(f"{name}: {kind.__name__} expected, got {type(value).__name__}")
    return value


def _event_log(document: dict[str, Any], takes_list: bool) -> str | None:
    log = document.get("event_log")
    return json.dumps(log) if takes_list and isinstance(log, list) else _member(document, "event_log", str)


def _octets(document: dict[str, Any], name: str) -> bytes | None:
    text = _member(document, name, str)
    if text is None:
        return None
    try:
        return binascii.unhexlify(text)
    except ValueError as error:
        raise RequestTypeError(f"{name}: hex expected: {error}") from error
