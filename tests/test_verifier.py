"""The verifier service, against the answers that the real one gave; its two one-shot modes; its configuration."""

import datetime
import http.client
import json
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st

from dstack_emu.attest.attestation import Attestation
from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.eventlog import log_to_json, replay_runtime
from dstack_emu.attest.image import Registers
from dstack_emu.attest.os_image import cache_key, encode_cache_entry
from dstack_emu.attest.release import release
from dstack_emu.attest.report_data import APP_DATA, report_data
from dstack_emu.attest.verify import TrustAnchor
from dstack_emu.cli.main import main
from dstack_emu.deployment.clock import wall_clock
from dstack_emu.simulator.image import OsImage
from dstack_emu.simulator.image_files import fill_cache
from dstack_emu.simulator.intel import Intel
from dstack_emu.simulator.pccs import pccs_app
from dstack_emu.simulator.seed import DEFAULT_SEED, Seed
from dstack_emu.simulator.trust_domain import AppCompose, KeyProvider, TrustDomain
from dstack_emu.transport.errors import ConfigError
from dstack_emu.transport.image_store import ImageStore
from dstack_emu.transport.listen import bind_tcp, serve
from dstack_emu.transport.pccs_client import AttestationVerifier, PccsClient
from dstack_emu.transport.ports import PORTS
from dstack_emu.verifier.config import VerifierConfig
from dstack_emu.verifier.server import MAX_BODY, verifier_app
from dstack_emu.verifier.service import InputError, RequestSyntaxError, RequestTypeError, VerificationRequest, Verifier
from tests import foreign
from tests.commands import run_command, serving, usage_error
from tests.evidence_samples import with_events_of_version_2
from tests.recorded import golden

Json = dict[str, Any]
INTEL = Intel(Seed.of(DEFAULT_SEED))
IMAGE = OsImage.from_seed(Seed.of(DEFAULT_SEED).derive)
NO_SERVER = "http://127.0.0.1:9/mr_{OS_IMAGE_HASH}.tar.gz"


def domain(claim: str | None = None) -> TrustDomain:
    """A guest that has booted and got its keys from somewhere; it claims a config, or tells the truth."""
    guest = TrustDomain(
        INTEL.platform("host of app"), IMAGE, AppCompose.named("app"), instance_seed=b"", claimed_config=claim
    )
    guest.boot()
    guest.complete(KeyProvider("kms", "00112233"))
    return guest


@dataclass
class Service:
    """A verifier on a socket, under the emulated root, with a cache of its own."""

    url: str
    cache: Path
    judge: Verifier

    async def post(self, body: Any, path: str = "/verify") -> tuple[int, str, str]:
        """POST JSON, or bytes as they are; return status, content type and body."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with aiohttp.ClientSession() as session, session.post(self.url + path, data=data) as response:
            return response.status, response.content_type, await response.text()

    async def verify(self, **request: Any) -> Json:
        status, kind, body = await self.post(request)
        assert (status, kind) == (200, "application/json"), body
        answer: Json = json.loads(body)
        return answer


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    """A verifier of release 0.5, which answers as the recorded one."""
    async with serving_verifier(tmp_path, "0.5") as found:
        yield found


@pytest.fixture
async def service_0_6(tmp_path: Path) -> AsyncIterator[Service]:
    async with serving_verifier(tmp_path, "0.6") as found:
        yield found


@asynccontextmanager
async def serving_verifier(tmp_path: Path, release_name: str) -> AsyncIterator[Service]:
    """Run a verifier of a release, and a PCCS for it."""
    pccs_server = await serve(pccs_app(INTEL), bind_tcp("127.0.0.1", 0))
    pccs, images = PccsClient(pccs_server.url), ImageStore(tmp_path / "cache", NO_SERVER, 5)
    evidence = AttestationVerifier(pccs, TrustAnchor.of(INTEL.root), wall_clock)
    judge = Verifier(evidence, images, release(release_name))
    server = await serve(verifier_app(judge), bind_tcp("127.0.0.1", 0))
    yield Service(server.url, tmp_path / "cache", judge)
    await server.close()
    await images.close()
    await pccs.close()
    await pccs_server.close()


# ---- the recorded answers

HARDWARE_LIKE = report_data("ratls-cert", b"key")


def _recorded_config() -> str:
    text: str = golden("attestations.json")["vm_config"]
    return text


def _quote_request(evidence: Attestation) -> Json:
    return {
        "quote": evidence.quote.hex(),
        "event_log": log_to_json(evidence.event_log),
        "vm_config": evidence.config,
    }


def _attestation_request(evidence: Attestation) -> Json:
    return {"attestation": evidence.encode().hex()}


def _pod(guest: TrustDomain) -> Json:
    payload = "a pod's claim"
    evidence = guest.attest(report_data(APP_DATA, payload.encode()))
    return _attestation_request(replace(evidence, report_data_payload=payload, wire=1))


def _of_version_2(guest: TrustDomain) -> Attestation:
    """Evidence whose runtime events are version 2 ones, quoted as such."""
    told = with_events_of_version_2(guest.attest(HARDWARE_LIKE))
    report = replace(guest.report(HARDWARE_LIKE), rt_mr3=replay_runtime(told.runtime_events))
    return replace(told, quote=guest.platform.quote(report, 4))


def _without_digests(evidence: Attestation) -> Attestation:
    """The same evidence, whose runtime events have no digest: so next's certificates had those of version 2, too."""
    log = tuple(replace(event, digest=b"") if event.imr == 3 else event for event in evidence.event_log)
    return replace(evidence, event_log=log)


def _tampered(guest: TrustDomain) -> Json:
    request = _quote_request(guest.attest(HARDWARE_LIKE))
    quote = bytearray.fromhex(request["quote"])
    quote[48 + 584 + 4 + 64] ^= 1  # the attestation key, which the quoting enclave vouches for
    return request | {"quote": quote.hex()}


REQUESTS: dict[str, Callable[[TrustDomain], Json]] = {
    "verify_att_id1_v1": lambda guest: _attestation_request(guest.attest(HARDWARE_LIKE).as_v1()),
    "verify_att_id1_v1-ev2": lambda guest: _attestation_request(_of_version_2(guest)),
    "verify_att_id1_v1-pod": _pod,
    "verify_att_stripped": lambda guest: _attestation_request(guest.attest(HARDWARE_LIKE).as_v1().stripped()),
    "verify_att_stripped_ev2": lambda guest: _attestation_request(_without_digests(_of_version_2(guest).stripped())),
    "verify_quote": lambda guest: _quote_request(guest.attest(HARDWARE_LIKE)),
    "verify_quote_tampered": _tampered,
}
"""How the requests are made whose bytes were not recorded, only what was in them."""


def masked(answer: Json) -> Json:
    """An answer without what is of another guest, and without the words of a foreign HTTP client."""
    reason = answer["reason"]
    if reason is not None:
        head, sending, rest = reason.partition("error sending request for url ")
        reason = head + sending + (rest.partition(")")[0] if sending else "")
    details = dict(answer["details"])
    if details["report_data"] is not None:
        assert len(details["report_data"]) == 128
        details["report_data"] = "…"
    return answer | {"reason": reason, "details": details}


def recorded_rows() -> list[Json]:
    rows = [row for row in golden("wire.json") if row["component"] == "verifier-or-auth"]
    return [row for row in rows if row["request"]["path"] == "/verify"]


async def test_recorded_calls_are_answered_as_by_the_real_verifier(service: Service) -> None:
    guest = domain(_recorded_config())
    replayed = 0
    for row in recorded_rows():
        name, request, expected = row["name"], row["request"], row["response"]
        if request["method"] == "GET":
            async with aiohttp.ClientSession() as session, session.get(service.url + "/verify") as response:
                assert (response.status, response.content_type) == (expected["status"], "text/html")
        else:
            body = REQUESTS[name](guest) if name in REQUESTS else request["body"].encode()
            status, kind, text = await service.post(body)
            assert (status, kind) == (expected["status"], expected["headers"]["content-type"]), name
            ours, theirs = json.loads(text), json.loads(expected["body"])
            assert masked(ours) == masked(theirs), name
            assert [list(ours), list(ours["details"])] == [list(theirs), list(theirs["details"])], name
        replayed += 1
    assert replayed == 10


# ---- what is valid


async def test_lite_guest_is_valid_in_each_form(service: Service) -> None:
    evidence = domain().attest(HARDWARE_LIKE)
    forms = [
        await service.verify(**request)
        for request in (
            _attestation_request(evidence),
            _attestation_request(evidence.as_v1()),
            _attestation_request(evidence.stripped()),
            _quote_request(evidence),
            _attestation_request(evidence) | {"quote": "00", "event_log": "no", "vm_config": "no", "unknown": 1},
        )
    ]
    assert forms == [forms[0]] * len(forms)
    details = forms[0]["details"]
    assert (forms[0]["is_valid"], forms[0]["reason"]) == (True, None)
    assert details["key_provider"] == {"name": "kms", "id": "00112233"}
    assert details["tcb_status"] == "UpToDate"
    assert list(details["boot_info"]) == [
        "teeVariant",
        "mrAggregated",
        "osImageHash",
        "mrSystem",
        "appId",
        "composeHash",
        "instanceId",
        "deviceId",
        "keyProviderInfo",
        "tcbStatus",
        "advisoryIds",
    ]
    assert details["boot_info"]["mrAggregated"] == details["app_info"]["mr_aggregated"]
    assert not service.cache.exists()


async def test_legacy_guest_is_valid_by_a_cache_that_was_filled_before(service: Service) -> None:
    config = replace(IMAGE.vm_config(), tdx_attestation_variant="legacy")
    registers, _ = IMAGE.boot(config)
    fill_cache(IMAGE, service.cache, cache_key(config), encode_cache_entry(registers))
    answer = await service.verify(**_attestation_request(domain(config.to_json()).attest(HARDWARE_LIKE)))
    assert (answer["is_valid"], answer["reason"]) == (True, None)
    assert answer["details"]["acpi_tables_verified"] is True
    assert answer["details"]["os_image_is_dev"] is False
    assert answer["details"]["os_image_version"] == "0.6.0"


async def test_image_says_what_it_is_though_registers_differ(service: Service) -> None:
    config = replace(IMAGE.vm_config(), tdx_attestation_variant="legacy")
    fill_cache(IMAGE, service.cache, cache_key(config), encode_cache_entry(Registers(*[bytes(48)] * 4)))
    answer = await service.verify(**_attestation_request(domain(config.to_json()).attest(HARDWARE_LIKE)))
    assert answer["reason"].startswith(
        "OS image hash verification failed: MRs do not match: MRTD mismatch: expected=00"
    )
    assert answer["details"]["os_image_version"] == "0.6.0"
    assert answer["details"]["acpi_tables_verified"] is False


# ---- a verifier of 0.6


async def test_lite_guest_has_verified_acpi_tables_in_0_6(service: Service, service_0_6: Service) -> None:
    request = _attestation_request(domain().attest(HARDWARE_LIKE))
    old, new = await service.verify(**request), await service_0_6.verify(**request)
    assert (old["details"].pop("acpi_tables_verified"), new["details"].pop("acpi_tables_verified")) == (False, True)
    assert old == new
    assert (new["is_valid"], list(new["details"])[-1]) == (True, "boot_info")


async def test_acpi_tables_of_another_image_are_not_verified_in_0_6(service_0_6: Service) -> None:
    answer = await service_0_6.verify(**_attestation_request(domain("{}").attest(HARDWARE_LIKE)))
    assert (answer["is_valid"], answer["details"]["acpi_tables_verified"]) == (False, False)
    assert "boot_info" not in answer["details"]
    answer = await service_0_6.verify(**_attestation_request(domain().attest(HARDWARE_LIKE)))
    assert (answer["is_valid"], answer["details"]["acpi_tables_verified"]) == (True, True)


async def test_config_beside_an_attestation_must_be_the_same_in_0_6(service_0_6: Service) -> None:
    evidence = domain().attest(HARDWARE_LIKE)
    request = _attestation_request(evidence)
    valid = await service_0_6.verify(**request)
    assert valid["is_valid"]
    wrapped = json.dumps({"vm_config": evidence.config})
    for same in ("", None, evidence.config):
        assert await service_0_6.verify(**request, vm_config=same) == valid
    for other in ("{}", evidence.config + " ", wrapped):
        answer = await service_0_6.verify(**request, vm_config=other)
        said = "vm_config of the request does not match the one in the attestation"
        assert (answer["is_valid"], answer["reason"]) == (False, f"OS image hash verification failed: {said}")
        assert (answer["details"]["quote_verified"], answer["details"]["os_image_hash_verified"]) == (True, False)


async def test_config_beside_a_quote_counts_in_0_6(service_0_6: Service) -> None:
    evidence = domain().attest(HARDWARE_LIKE)
    assert (await service_0_6.verify(**_quote_request(evidence)))["is_valid"]
    answer = await service_0_6.verify(**_quote_request(evidence) | {"vm_config": "{}"})
    assert answer["reason"].startswith("OS image hash verification failed: ")
    bare = _attestation_request(replace(evidence, config=""))
    assert (await service_0_6.verify(**bare, vm_config=evidence.config))["is_valid"]


async def test_answers_do_not_tell_the_version(service: Service, service_0_6: Service) -> None:
    """The real verifier sends no X-App-Version, unlike the KMS and the agent."""
    async with aiohttp.ClientSession() as session:
        for found in (service, service_0_6):
            async with session.get(f"{found.url}/health") as response:
                assert "X-App-Version" not in response.headers


# ---- what is no request


@pytest.mark.parametrize(
    ("request_body", "reason"),
    [
        ({"quote": "00"}, "Event log is required"),
        ({"quote": "00", "event_log": "no"}, "Failed to create attestation"),
        ({"quote": "00", "event_log": "[]"}, "Failed to create attestation"),
        ({"attestation": "77"}, "Failed to decode attestaion"),
        ({"attestation": None, "quote": None}, "Quote is required"),
    ],
)
async def test_unreadable_evidence_is_an_internal_error(service: Service, request_body: Json, reason: str) -> None:
    answer = await service.verify(**request_body)
    assert (answer["is_valid"], answer["reason"]) == (False, f"Internal error: {reason}")
    whole = _quote_request(domain().attest(HARDWARE_LIKE)) if "quote" in request_body else {}
    whole = whole or _attestation_request(domain().attest(HARDWARE_LIKE))
    assert (await service.verify(**request_body | whole))["is_valid"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{bad", 400),
        (b"", 400),
        (b"[]", 422),
        (b'{"quote": "0"}', 422),
        (b'{"quote": "0x00"}', 422),
        (b'{"attestation": "0x00"}', 422),
        (b'{"quote": "00 00"}', 422),
        (b'{"quote": 1}', 422),
        (b'{"debug": "yes"}', 422),
        (b'{"quote": "00", "quote": "00"}', 422),
        (b'{"vm_config": {}}', 422),
        (b" " * (MAX_BODY + 1), 413),
    ],
)
async def test_what_is_no_request_gets_a_page(service: Service, body: bytes, status: int) -> None:
    got, kind, _ = await service.post(body)
    assert (got, kind) == (status, "text/html")
    request = _quote_request(domain().attest(HARDWARE_LIKE))
    assert (await service.post(json.dumps(request).encode()))[:2] == (200, "application/json")


async def test_hex_of_either_case_is_read(service: Service) -> None:
    evidence = domain().attest(HARDWARE_LIKE)
    request = _quote_request(evidence)
    log = json.loads(request["event_log"])
    digests = json.dumps([event | {"digest": event["digest"].upper()} for event in log])
    assert (await service.verify(**request | {"quote": request["quote"].upper(), "event_log": digests}))["is_valid"]
    for spoilt in ({"digest": "0x" + log[0]["digest"]}, {"digest": log[0]["digest"] + " "}, {"event_payload": "0 0"}):
        answer = await service.verify(**request | {"event_log": json.dumps([log[0] | spoilt, *log[1:]])})
        assert (answer["is_valid"], answer["reason"]) == (False, "Internal error: Failed to create attestation")


@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: f'{{"event_log": "{text}"}}'.encode()))
def test_any_bytes_are_a_request_or_none(body: bytes) -> None:
    try:
        evidence, _ = VerificationRequest.parse(body).evidence()
    except (RequestSyntaxError, RequestTypeError, InputError):
        return
    assert evidence.quote


async def test_unknown_paths_are_404_and_health_answers(service: Service) -> None:
    assert (await service.post({}, "/other"))[0] == 404
    async with aiohttp.ClientSession() as session, session.get(f"{service.url}/health") as response:
        assert (response.status, await response.text()) == (200, '{"status":"ok","service":"dstack-verifier"}')


# ---- the command


@pytest.fixture(scope="module")
def pccs() -> Iterator[str]:
    with serving("pccs", "--listen", "127.0.0.1:0") as description:
        yield description["url"]


def written(path: Path, document: Any) -> str:
    path.write_text(json.dumps(document))
    return str(path)


def test_service_answers_as_a_command(pccs: str) -> None:
    with serving("verifier", "--listen", "127.0.0.1:0", "--pccs", pccs) as description:
        assert description["root"] == "the emulated root of seed 'dstack-emu'"
        connection = http.client.HTTPConnection(urlsplit(description["url"]).netloc, timeout=20)
        connection.request("POST", "/verify", json.dumps(_attestation_request(domain().attest(HARDWARE_LIKE))))
        assert json.loads(connection.getresponse().read())["is_valid"] is True


def test_command_is_a_verifier_of_the_named_release(pccs: str, tmp_path: Path) -> None:
    request = _attestation_request(domain().attest(HARDWARE_LIKE)) | {"vm_config": "{}"}
    file = written(tmp_path / "request.json", request)
    for name, status in (("0.5", 0), ("0.6", 1)):
        assert run_command("verifier", "--release", name, "--pccs", pccs, "--verify", file).returncode == status


def test_one_file_is_judged_and_the_answer_written_beside_it(pccs: str, tmp_path: Path) -> None:
    good = written(tmp_path / "good.json", _attestation_request(domain().attest(HARDWARE_LIKE)))
    done = run_command("verifier", "--pccs", pccs, "--verify", good)
    answer = json.loads(done.stdout)
    assert (done.returncode, answer["is_valid"], done.stderr) == (0, True, b"")
    assert json.loads((tmp_path / "good.json.verification.json").read_text()) == answer
    # Under another root the same file proves nothing.
    done = run_command("verifier", "--pccs", pccs, "--verify", good, "--seed", "another")
    assert (done.returncode, json.loads(done.stdout)["is_valid"]) == (1, False)
    assert json.loads(done.stdout)["reason"].startswith("Quote verification failed: failed to verify TDX quote: ")


def test_file_of_the_quote_command_is_verified_and_its_form_is_no_request(
    pccs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "quote.json"
    done = run_command("quote", "--json", "--report-data", "00" * 64)
    path.write_bytes(done.stdout)
    assert isinstance(json.loads(done.stdout)["event_log"], list)
    with pytest.raises(RequestTypeError, match="event_log: str expected, got list"):
        VerificationRequest.parse(done.stdout)
    done = run_command("verifier", "--pccs", pccs, "--verify", str(path))
    answer = json.loads(done.stdout)
    assert (done.returncode, answer["is_valid"], answer["reason"]) == (0, True, None)
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"event_log": document["event_log"][:-1]}))
    done = run_command("verifier", "--pccs", pccs, "--verify", str(path))
    answer = json.loads(done.stdout)
    assert (done.returncode, answer["is_valid"]) == (1, False)
    assert answer["reason"].startswith("Quote verification failed: RTMR3 mismatch, quoted: ")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{}", "Internal error: Quote is required"),
        ('{"attestation": "77"}', "Internal error: Failed to decode attestaion: Unknown attestation wire format"),
        ("{bad", "Internal error: Failed to parse JSON: …"),
        (None, "Internal error: Failed to read file …"),
    ],
)
def test_one_file_that_is_no_request_fails_with_one_document(
    content: str | None, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "request.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as ended:
        main(["verifier", "--verify", str(path)])
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert (ended.value.code, answer["is_valid"]) == (1, False)
    assert answer["reason"].startswith(reason.partition("…")[0])
    assert err.splitlines() == [f"Error: {answer['reason']}"]
    assert not (tmp_path / "request.json.verification.json").exists()


def certificate(
    evidence: Callable[[bytes], bytes] | None,
    key: ec.EllipticCurvePrivateKey,
    *,
    usage: bool = True,
    purposes: tuple[x509.ObjectIdentifier, ...] = (ExtendedKeyUsageOID.SERVER_AUTH,),
    name: str | None = "app.example.com",
    days: int = 1,
    signer: ec.EllipticCurvePrivateKey | None = None,
) -> x509.Certificate:
    """A certificate that a server might show, self-signed unless another signs."""
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "endpoint")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now - datetime.timedelta(days=3))
    builder = builder.not_valid_after(now + datetime.timedelta(days=days))
    flags = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign"), False
    )
    key_usage = x509.KeyUsage(
        digital_signature=usage, key_cert_sign=not usage, encipher_only=False, decipher_only=False, **flags
    )
    builder = builder.add_extension(key_usage, critical=True)
    if purposes:
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    if name is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    if evidence is not None:
        value = foreign.der_octet_string(evidence(foreign.spki_of(key)))
        extension = x509.UnrecognizedExtension(foreign.OID_ATTESTATION, value)
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(signer or key, hashes.SHA256())


def attested(spki: bytes) -> bytes:
    return domain().attest(report_data("ratls-cert", spki)).stripped().encode()


KEY = ec.generate_private_key(ec.SECP256R1())


async def test_self_signed_certificate_is_judged(service: Service) -> None:
    made = certificate(attested, KEY)
    answers = [
        await service.judge.verify_certificate(made.public_bytes(form), wall_clock)
        for form in (Encoding.PEM, Encoding.DER)
    ]
    assert answers[0] == answers[1]
    details = answers[0]["details"]
    assert answers[0]["is_valid"] is True
    assert details["public_key_der"] == foreign.spki_of(KEY).hex()
    assert details["app_info"]["os_image_hash"] == IMAGE.os_image_hash.hex()
    assert details["app_info"]["os_image_hash_verified"] is True


async def test_certificate_with_evidence_of_the_guest_api_v1_is_judged_by_0_6(service_0_6: Service) -> None:
    def evidence(spki: bytes) -> bytes:
        return domain().attest(report_data("ratls-cert", spki)).as_v1().stripped(keep_digests=True).encode()

    pem = certificate(evidence, KEY).public_bytes(Encoding.PEM)
    assert (await service_0_6.judge.verify_certificate(pem, wall_clock))["is_valid"]
    of_a_guest = certificate(evidence, KEY, signer=OTHER).public_bytes(Encoding.PEM)
    with pytest.raises(FormatError, match="^certificate self-signature verification failed$"):
        await service_0_6.judge.verify_certificate(of_a_guest, wall_clock)


async def test_image_of_the_legacy_variant_is_not_downloaded_for_a_certificate(service: Service) -> None:
    claim = replace(IMAGE.vm_config(), tdx_attestation_variant="legacy").to_json()
    made = certificate(lambda spki: domain(claim).attest(report_data("ratls-cert", spki)).stripped().encode(), KEY)
    answer = await service.judge.verify_certificate(made.public_bytes(Encoding.PEM), wall_clock)
    assert answer["details"]["app_info"]["os_image_hash_verified"] is False


def test_certificate_is_judged_by_the_command(pccs: str, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.pem", tmp_path / "bad.pem"
    good.write_bytes(certificate(attested, KEY).public_bytes(Encoding.PEM))
    bad.write_bytes(certificate(attested, KEY, name=None).public_bytes(Encoding.PEM))
    done = run_command("verifier", "--pccs", pccs, "--verify-cert", str(good))
    assert (done.returncode, json.loads(done.stdout)["is_valid"]) == (0, True)
    assert json.loads((tmp_path / "good.pem.ratls-verification.json").read_text()) == json.loads(done.stdout)
    done = run_command("verifier", "--pccs", pccs, "--verify-cert", str(bad))
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"Error: certificate SAN extension missing\n")
    assert {path.name for path in tmp_path.iterdir()} == {"good.pem", "bad.pem", "good.pem.ratls-verification.json"}


OTHER = ec.generate_private_key(ec.SECP256R1())


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda: certificate(attested, KEY, signer=OTHER), "certificate self-signature verification failed"),
        (lambda: certificate(attested, KEY, days=-1), "certificate is outside its validity period"),
        (
            lambda: certificate(attested, KEY, usage=False),
            "certificate key usage does not permit digital signatures",
        ),
        (lambda: certificate(attested, KEY, purposes=()), "certificate extended key usage extension missing"),
        (
            lambda: certificate(attested, KEY, purposes=(ExtendedKeyUsageOID.CODE_SIGNING,)),
            "certificate extended key usage permits neither server nor client authentication",
        ),
        (lambda: certificate(attested, KEY, name=None), "certificate SAN extension missing"),
        (
            lambda: certificate(None, KEY),
            "failed to verify RA-TLS certificate: RA-TLS attestation extension missing",
        ),
        (
            lambda: certificate(lambda spki: attested(foreign.spki_of(OTHER)), KEY),
            "failed to verify RA-TLS certificate: RA-TLS attestation verification failed: report data mismatch",
        ),
    ],
)
async def test_certificate_refused(made: Callable[[], x509.Certificate], reason: str, service: Service) -> None:
    with pytest.raises(FormatError) as refused:
        await service.judge.verify_certificate(made().public_bytes(Encoding.PEM), wall_clock)
    assert str(refused.value) == reason
    good = certificate(attested, KEY).public_bytes(Encoding.PEM)
    assert (await service.judge.verify_certificate(good, wall_clock))["is_valid"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "failed to parse X.509 certificate: "),
        (b"-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n", "failed to parse PEM certificate: "),
    ],
)
async def test_what_is_no_certificate_refused(data: bytes, reason: str, service: Service) -> None:
    with pytest.raises(FormatError, match=f"^{reason}"):
        await service.judge.verify_certificate(data, wall_clock)


# ---- configuration


def load(path: Path, text: str, **environment: str) -> VerifierConfig:
    path.write_text(text)
    return VerifierConfig.load(path, environment)


def test_upstreams_file_is_read_and_variables_go_before_it(tmp_path: Path) -> None:
    text = """
        address = "0.0.0.0"
        port = 18080
        image_cache_dir = "/var/cache/images"
        image_download_url = "https://example.com/mr_{OS_IMAGE_HASH}.tar.gz"
        image_download_timeout_secs = 7
        [attestation]
        insecure_allow_external_trust_anchors = false
        [attestation.urls]
        pccs = "http://127.0.0.1:1"
        [attestation.root_ca]
    """
    config = load(tmp_path / "v.toml", text)
    assert (config.address, config.port, config.image_download_timeout_secs) == ("0.0.0.0", 18080, 7)
    assert config.attestation.urls.pccs == "http://127.0.0.1:1"
    config = load(
        tmp_path / "v.toml",
        text,
        DSTACK_VERIFIER_PORT="19090",
        DSTACK_VERIFIER_ATTESTATION__URLS__PCCS="http://127.0.0.1:2",
    )
    assert (config.port, config.attestation.urls.pccs) == (19090, "http://127.0.0.1:2")
    assert load(tmp_path / "v.toml", 'host = "127.0.0.2"').address == "127.0.0.2"
    assert VerifierConfig.load(None, {}).port == PORTS["verifier"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("port = 0", "verifier port must not be zero"),
        ('address = "localhost"', "invalid verifier address: localhost"),
        ('address = "fe80::1%eth0"', "invalid verifier address: fe80::1%eth0"),
        ('image_cache_dir = " "', "image_cache_dir must not be empty"),
        ("image_download_timeout_secs = 0", "image_download_timeout_secs must be greater than zero"),
        ('image_download_url = "http://127.0.0.1/x"', "image_download_url must contain {OS_IMAGE_HASH}"),
        ('image_download_url = "ftp://h/{OS_IMAGE_HASH}"', "image_download_url must use http or https"),
        ('image_download_url = "http:///{OS_IMAGE_HASH}"', "invalid image_download_url: "),
        ('image_download_url = "http://h:x/{OS_IMAGE_HASH}"', "invalid image_download_url: "),
        ('port = 0\naddress = "localhost"\nimage_cache_dir = ""', "invalid verifier address: localhost"),
        ('port = 0\nimage_cache_dir = ""', "verifier port must not be zero"),
        ('unknown = 1\naddress = "localhost"', "Failed to load configuration: "),
        ("[attestation]\nunknown = 1", "Failed to load configuration: "),
        ("port", "Failed to load configuration: "),
        ('port = "18080"', "Failed to load configuration: "),
        ("port = 65536", "Failed to load configuration: "),
        ("image_download_timeout_secs = -1", "Failed to load configuration: "),
        ("image_cache_dir = 7", "Failed to load configuration: "),
        ('attestation = { insecure_allow_external_trust_anchors = "true" }', "Failed to load configuration: "),
    ],
)
def test_config_is_refused_with_upstreams_text(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        load(tmp_path / "v.toml", text)
    assert str(refused.value).startswith(reason)
    assert str(tmp_path / "v.toml") in str(refused.value)
    assert load(tmp_path / "v.toml", "").port == PORTS["verifier"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("unknown = 1", "unknown: unknown key"),
        ("[attestation]\nunknown = 1", "attestation.unknown: unknown key"),
        ("port", "is not TOML"),
        ('port = "18080"', "port: "),
    ],
)
def test_config_that_is_none_is_refused_naming_the_key(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        load(tmp_path / "v.toml", text)
    assert reason in str(refused.value)


def written_root(folder: Path, name: str) -> Path:
    """A file that may be a root certificate, made by openssl."""
    path = folder / f"{name}.pem"
    extension = {"ca": "CA:TRUE", "no ca": "CA:FALSE"}.get(name)
    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", str(folder / "key.pem"))
    added = () if extension is None else ("-addext", f"basicConstraints=critical,{extension}")
    bare = folder / "bare.cnf"
    bare.write_text("[req]\ndistinguished_name=dn\n[dn]\n")
    subject = ("-subj", "/CN=root", "-config", str(bare))
    subprocess.run(
        ("openssl", "req", "-x509", *new_key, *subject, *added, "-out", str(path)), check=True, capture_output=True
    )
    return path


@pytest.mark.parametrize("option", [True, False], ids=["--root", "root_ca.tdx"])
def test_root_that_is_no_ca_is_refused_at_the_start(tmp_path: Path, pccs: str, option: bool) -> None:
    def arguments(path: Path) -> tuple[str, ...]:
        if option:
            return "verifier", "--pccs", pccs, "--listen", "127.0.0.1:0", "--root", str(path)
        config = tmp_path / "v.toml"
        root = f'insecure_allow_external_trust_anchors = true\nroot_ca = {{ tdx = "{path}" }}'
        config.write_text(f"[attestation]\n{root}\n")
        return "verifier", "--pccs", pccs, "--listen", "127.0.0.1:0", "-c", str(config)

    def refusal(path: Path) -> str:
        return usage_error(*arguments(path))

    for name in ("no ca", "nothing about it"):
        path = written_root(tmp_path, name)
        assert refusal(path) == f"TDX root certificate is not a CA: {path}"
    good = written_root(tmp_path, "ca")
    der = tmp_path / "root.der"
    subprocess.run(("openssl", "x509", "-in", str(good), "-outform", "DER", "-out", str(der)), check=True)
    for path in (good, der):
        with serving(*arguments(path)) as started:
            assert str(path) in started["root"]
    der.write_bytes(der.read_bytes() + b"\0")
    assert refusal(der) == f"trailing data in TDX root CA: {der}"
    good.write_text("-----BEGIN CERTIFICATE-----\nnone\n-----END CERTIFICATE-----\n")
    assert refusal(good).startswith("failed to parse TDX root CA PEM: ")
    der.write_bytes(b"none")
    assert refusal(der).startswith("failed to parse TDX root CA certificate: ")
    der.unlink()
    assert refusal(der) == f"failed to read TDX root CA from {der}: No such file or directory"


def test_root_in_the_file_needs_its_opt_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "v.toml"
    path.write_text(f'[attestation.root_ca]\ntdx = "{tmp_path}/root.pem"\n')
    with pytest.raises(SystemExit) as ended:
        main(["verifier", "-c", str(path)])
    assert (ended.value.code, capsys.readouterr().err) == (
        2,
        "Error: external attestation trust anchors are configured but insecure_allow_external_trust_anchors is false "
        "(attestation.root_ca.tdx is set, which needs attestation.insecure_allow_external_trust_anchors = true)\n",
    )
