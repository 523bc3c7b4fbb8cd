"""What is found in an input: its kind and its contents, with the evidence in it.

`inspection.identify` finds it, in JSON by `inspection.answers`.
"""

from dataclasses import dataclass
from typing import NoReturn

from dstack_emu.attest.attestation import Attestation
from dstack_emu.attest.csr import CONFIRM, SigningRequest
from dstack_emu.attest.errors import FormatError
from dstack_emu.inspection.checks import Binding, Evidence
from dstack_emu.inspection.description import Description
from dstack_emu.inspection.fields import describe_evidence, describe_request


@dataclass(frozen=True, slots=True)
class Finding:
    """The kind of an input, and its contents.

    If `sure` is false, it decodes as that kind, but could also be something else. `form` lists its encodings,
    outermost first (none: binary). If there is no `evidence`, `obstacle` may say why the evidence in it cannot be read.
    """

    what: str
    description: Description
    evidence: Evidence | None = None
    sure: bool = True
    form: tuple[str, ...] = ()
    obstacle: str = ""


def looks_like(what: str, error: Exception) -> NoReturn:
    """Refuse an input that is a damaged one of a known kind: raise `FormatError`."""
    raise FormatError(f"looks like {what}, but {error}") from error


def attestation_found(attestation: Attestation, binding: Binding | None = None) -> Finding:
    """Return what an attestation is; `binding` is what its report_data has to bind."""
    form = "V0 (SCALE)" if attestation.wire == 0 else "V1 (msgpack)"
    kind = "" if attestation.report_data_payload is None else ", of a pod"
    evidence = Evidence.of_attestation(attestation, binding)
    description = describe_evidence(evidence)
    return Finding(f"versioned attestation {form}{kind}", description, evidence, sure="quote" not in description)


def request_found(request: SigningRequest, version: int, signature: bytes | None = None) -> Finding:
    """Return what a signing request of version 1 or 2 is, with its signature if there is one."""
    evidence = Evidence.of_request(request, version, signature)
    described = {"signing_request": describe_request(request, version, signature)}
    return Finding(
        f"dstack certificate signing request, version {version}",
        described | describe_evidence(evidence),
        evidence,
        sure=request.confirm == CONFIRM,
    )
