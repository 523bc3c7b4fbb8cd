"""Whatever is done to encoded bytes, the decoders of `attest` refuse them with their own errors alone.

Every form starts valid; then bits are flipped, pieces are cut out, repeated, put in or taken from another place, and of
the forms that have an inner structure (JSON, msgpack, CBOR) single values are replaced as well. What still decodes is
used as its readers use it.
"""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import cbor2
import msgpack
import pytest
from cryptography import x509
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dstack_emu.attest import attestation, certificate, collateral, eventlog, image
from dstack_emu.attest.app_info import decode_app_info, vm_config_of
from dstack_emu.attest.attestation import Attestation
from dstack_emu.attest.csr import SigningRequest
from dstack_emu.attest.errors import AttestError
from dstack_emu.attest.eventlog import TdxEvent
from dstack_emu.attest.pck import PckExtension, pck_extension_of
from dstack_emu.attest.pcs import Document
from dstack_emu.attest.quote import Quote
from dstack_emu.attest.verify import require_bound_to_key, verify_attestation, verify_quote
from dstack_emu.attest.vmconfig import VmConfig
from tests.evidence_samples import (
    NOW,
    World,
    attestations,
    authority,
    certificates,
    issued,
    legacy_certificate,
    pod,
    quotes,
    signing_request,
    signing_requests_v1,
    with_events_of_version_2,
    with_extensions,
    world,
)

THOROUGH: Final = settings(
    max_examples=int(os.environ.get("DSTACK_EMU_EXAMPLES", "20")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

Operation = Callable[[], object]


# ---- what is done to them


@st.composite
def mutated(draw: st.DrawFn, samples: Callable[[], list[bytes]]) -> bytes:
    """One of the samples after one to three changes."""
    choice = samples()
    data = draw(st.sampled_from(choice))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.sampled_from((1, 2, 4, 16, 1000))))
        match draw(st.sampled_from(("flip", "overwrite", "cut", "truncate", "insert", "repeat", "splice"))):
            case "flip" if at < len(data):
                data = data[:at] + bytes((data[at] ^ 1 << draw(st.integers(0, 7)),)) + data[at + 1 :]
            case "overwrite":
                piece = draw(st.sampled_from((b"\x00", b"\xff", b"\x80", b"\xff\xff\xff\xff", b'"', b"[", b"\xc1")))
                data = data[:at] + piece + data[at + len(piece) :]
            case "cut":
                data = data[:at] + data[end:]
            case "truncate":
                data = data[:at]
            case "insert":
                data = data[:at] + draw(st.binary(max_size=8)) + data[at:]
            case "repeat":
                data = data[:end] + data[at:]
            case _:
                other = draw(st.sampled_from(choice))
                begin = draw(st.integers(0, len(other)))
                data = data[:at] + other[begin : begin + end - at] + data[end:]
    return data


ODD: Final = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from((-1, 0, 2, 255, 256, 2**32, 2**63, 2**64 - 1, 1.5, float("inf"), float("nan"))),
    st.sampled_from(("", "0", "zz", "00 00", "\ud800", "é", "9999-99-99T00:00:00Z", "2024-01-01", "0001-01-01T00:00Z")),
    st.binary(max_size=4),
    st.text(max_size=4),
    st.just([]),
    st.just({}),
    st.just([[]]),
    st.just([1, 300, -1]),
    st.just({"version": 2}),
)
"""Values that a reader of a structure may not expect where they stand."""


@st.composite
def restructured(draw: st.DrawFn, sample: Any, *, binary: bool = False) -> Any:
    """The structure with one value replaced, left out, or joined by another of an odd name.

    Bytes are odd values only where the encoding has them.
    """
    odd = ODD if binary else ODD.filter(lambda value: not isinstance(value, bytes))
    if isinstance(sample, (dict, list)) and sample and draw(st.integers(0, 9)):
        keys = list(sample) if isinstance(sample, dict) else list(range(len(sample)))
        key, copy = draw(st.sampled_from(keys)), sample.copy()
        action = draw(st.integers(0, 9))
        if action == 0:
            del copy[key]
        elif action == 1 and isinstance(copy, dict):
            copy[draw(st.sampled_from(("", "version", "\ud800", "preimage")))] = draw(odd)
        else:
            copy[key] = draw(restructured(sample[key], binary=binary))
        return copy
    return draw(odd)


def assert_only_own_errors(*operations: Operation) -> None:
    """Run each operation and assert that it succeeds or raises an `AttestError`."""
    for operation in operations:
        try:
            operation()
        except AttestError:
            continue
        except Exception as error:
            raise AssertionError(f"{error!r} instead of an AttestError") from error


# ---- what is done with what comes of it


def use_log(log: tuple[TdxEvent, ...]) -> None:
    assert_only_own_errors(
        lambda: eventlog.log_to_json(log).encode(),
        lambda: [eventlog.replay_register(log, imr) for imr in range(4)],
        lambda: eventlog.validate_preimages(log),
        lambda: eventlog.log_to_json(eventlog.strip(log)).encode(),
        lambda: eventlog.log_to_json(eventlog.for_get_quote(log)).encode(),
    )


def use_evidence(evidence: Attestation) -> None:
    w = world()
    use_log(evidence.event_log)
    assert_only_own_errors(
        evidence.encode,
        evidence.stripped().encode,
        evidence.as_v1().encode,
        lambda: decode_app_info(evidence).encode(),
        lambda: decode_app_info(evidence, boot_time=True),
        lambda: require_bound_to_key(evidence, w.spki),
        lambda: verify_attestation(evidence, w.collateral, w.anchor, NOW).boot_info().to_json(),
    )


def use_certificate(one: x509.Certificate) -> None:
    oids = (certificate.OID_APP_ID, certificate.OID_APP_INFO, certificate.OID_EVENT_LOG)
    assert_only_own_errors(
        lambda: certificate.certificate_spki(one),
        lambda: certificate.usage_of(one),
        lambda: pck_extension_of(one),
        lambda: [certificate.extension_payload(one, oid) for oid in oids],
        lambda: use_evidence(certificate.attestation_of(one) or world().evidence),
    )


def use_signing_request(request: SigningRequest) -> None:
    assert_only_own_errors(
        lambda: request.verify_signature(bytes(70)),
        lambda: authority().issue(request.certificate_request(usage="app:custom", app_id=bytes(20)), NOW),
        lambda: use_evidence(request.attestation),
    )


# ---- the properties


@THOROUGH
@given(mutated(quotes))
def test_mutated_quotes_raise_only_own_errors(data: bytes) -> None:
    w = world()
    assert_only_own_errors(
        lambda: Quote.parse(data).encode(),
        lambda: collateral.CollateralKey.of_quote(data),
        lambda: verify_quote(data, w.collateral, w.anchor, NOW),
        lambda: use_evidence(attestation.from_quote_and_log(data, b"[]")),
    )


@THOROUGH
@given(mutated(attestations))
def test_mutated_attestations_raise_only_own_errors(data: bytes) -> None:
    assert_only_own_errors(lambda: use_evidence(attestation.decode(data)))


@THOROUGH
@given(st.data())
def test_msgpack_attestations_of_odd_structure_raise_only_own_errors(data: st.DataObject) -> None:
    evidence = world().evidence
    form = data.draw(st.sampled_from((evidence.as_v1(), with_events_of_version_2(evidence), pod(evidence))))
    document = data.draw(restructured(msgpack.unpackb(form.encode()), binary=True))
    packed = msgpack.packb(document, unicode_errors="surrogatepass")
    assert_only_own_errors(lambda: use_evidence(attestation.decode(packed)))


@THOROUGH
@given(mutated(lambda: [signing_request().encoded, signing_request(pod(world().evidence)).encoded]))
def test_mutated_signing_requests_of_version_2_raise_only_own_errors(data: bytes) -> None:
    assert_only_own_errors(lambda: use_signing_request(SigningRequest.parse(data, 2)))


@THOROUGH
@given(mutated(signing_requests_v1))
def test_mutated_signing_requests_of_version_1_raise_only_own_errors(data: bytes) -> None:
    assert_only_own_errors(lambda: use_signing_request(SigningRequest.parse(data, 1)))


def test_signing_request_of_version_1_that_the_mutations_start_from_decodes() -> None:
    request = SigningRequest.parse(signing_requests_v1()[0], 1)
    assert request.attestation.quote == world().evidence.quote
    assert request.attestation.runtime_events == world().evidence.runtime_events


@THOROUGH
@given(mutated(lambda: [eventlog.log_to_json(world().evidence.event_log).encode()]))
def test_mutated_event_logs_raise_only_own_errors(data: bytes) -> None:
    assert_only_own_errors(lambda: use_log(eventlog.log_from_json(data)))


@THOROUGH
@given(st.data())
def test_event_logs_of_odd_structure_raise_only_own_errors(data: st.DataObject) -> None:
    evidence = data.draw(st.sampled_from((world().evidence, with_events_of_version_2(world().evidence))))
    document = data.draw(restructured(json.loads(eventlog.log_to_json(evidence.event_log))))
    text = json.dumps(document).encode()
    assert_only_own_errors(
        lambda: use_log(eventlog.log_from_json(text)),
        lambda: use_evidence(attestation.from_quote_and_log(evidence.quote, text)),
    )


@THOROUGH
@given(mutated(certificates))
def test_mutated_certificates_raise_only_own_errors(data: bytes) -> None:
    assert_only_own_errors(lambda: use_certificate(certificate.load_der(data)))


@THOROUGH
@given(mutated(lambda: [certificate.pem(issued()).encode()]))
def test_mutated_pem_certificates_raise_only_own_errors(data: bytes) -> None:
    text = data.decode(errors="replace")
    assert_only_own_errors(lambda: use_certificate(certificate.load_pem(text, "certificate")))


@pytest.mark.parametrize("oid", [certificate.OID_ATTESTATION, certificate.OID_TDX_QUOTE, certificate.OID_EVENT_LOG])
@THOROUGH
@given(st.data())
def test_certificates_with_mutated_extension_raise_only_own_errors(
    oid: x509.ObjectIdentifier, data: st.DataObject
) -> None:
    base = issued() if oid == certificate.OID_ATTESTATION else legacy_certificate()
    values = {e.oid: e.value.value for e in base.extensions if isinstance(e.value, x509.UnrecognizedExtension)}
    values[oid] = data.draw(mutated(lambda: [values[oid]]))
    use_certificate(with_extensions(values))


@THOROUGH
@given(st.sampled_from(range(4)), st.data())
def test_mutated_collateral_documents_raise_only_own_errors(which: int, data: st.DataObject) -> None:
    w, documents = world(), list(world().documents)
    chain = data.draw(st.sampled_from((documents[which].issuer_chain, "", "%", "\udcff", "-----BEGIN")))
    body = data.draw(mutated(lambda: [documents[which].body]))
    documents[which] = Document(body, chain)
    use_collateral(w, documents)


@THOROUGH
@given(st.sampled_from((1, 2)), st.data())
def test_collateral_documents_of_odd_structure_raise_only_own_errors(which: int, data: st.DataObject) -> None:
    w, documents = world(), list(world().documents)
    body = data.draw(restructured(json.loads(documents[which].body)))
    documents[which] = Document(json.dumps(body).encode(), documents[which].issuer_chain)
    use_collateral(w, documents)


def use_collateral(w: World, documents: list[Document]) -> None:
    with suppress(AttestError):
        assembled = collateral.assemble(*documents)
        assert_only_own_errors(
            lambda: collateral.earliest_expiry(assembled),
            lambda: verify_quote(w.evidence.quote, assembled, w.anchor, NOW),
        )


@THOROUGH
@given(mutated(lambda: [pck_extension_of(world().domain.platform.pck_certificate).encode()]))
def test_mutated_pck_extensions_raise_only_own_errors(data: bytes) -> None:
    assert_only_own_errors(lambda: PckExtension.parse(data).encode())


@THOROUGH
@given(mutated(lambda: [world().domain.vm_config_json.encode()]))
def test_mutated_vm_configs_raise_only_own_errors(data: bytes) -> None:
    text = data.decode(errors="surrogateescape")
    assert_only_own_errors(lambda: VmConfig.parse(text).to_json().encode(), lambda: vm_config_of(text))


@THOROUGH
@given(restructured(json.loads(world().domain.vm_config_json) | {"vm_config": "{}"}))
def test_vm_configs_of_odd_structure_raise_only_own_errors(document: Any) -> None:
    text = json.dumps(document)
    assert_only_own_errors(
        lambda: VmConfig.parse(text).to_json().encode(),
        lambda: vm_config_of(text),
        lambda: use_measurement(text),
    )


def use_measurement(text: str) -> None:
    config = VmConfig.parse(text)
    document = config.tdx_measurement
    if document is not None:
        assert_only_own_errors(
            lambda: image.sha256sum_entry(document.checksum_file, image.MEASUREMENT_FILE),
            lambda: measure(image.ImageMeasurement.decode(document.measurement), config),
        )


def measure(measurement: image.ImageMeasurement, config: VmConfig) -> None:
    image.TdHobWitness.parse(measurement.td_hob).td_hob(2 << 30)
    image.measure(measurement, config, (bytes(48), bytes(48), bytes(48)))


@THOROUGH
@given(mutated(lambda: [world().domain.image.measurement.encode()]))
def test_mutated_measurement_documents_raise_only_own_errors(data: bytes) -> None:
    assert_only_own_errors(lambda: measure(image.ImageMeasurement.decode(data), world().domain.vm_config))


@THOROUGH
@given(restructured(cbor2.loads(world().domain.image.measurement.encode()), binary=True))
def test_measurement_documents_of_odd_structure_raise_only_own_errors(document: Any) -> None:
    try:
        data = cbor2.dumps(document)
    except ValueError:
        return  # CBOR has no lone surrogates
    assert_only_own_errors(lambda: measure(image.ImageMeasurement.decode(data), world().domain.vm_config))


@THOROUGH
@given(mutated(lambda: [world().domain.image.measurement.td_hob]), st.sampled_from((0, 1, 2 << 30, 4 << 30, 1 << 60)))
def test_mutated_td_hob_witnesses_raise_only_own_errors(data: bytes, memory_size: int) -> None:
    assert_only_own_errors(lambda: image.TdHobWitness.parse(data).td_hob(memory_size))


@THOROUGH
@given(mutated(lambda: [world().domain.image.files["sha256sum.txt"]]))
def test_mutated_checksum_files_raise_only_own_errors(data: bytes) -> None:
    assert_only_own_errors(lambda: image.sha256sum_entry(data, image.MEASUREMENT_FILE))
