"""Quotes and collateral of the emulated platform before the library that the real KMS judges with, `dcap-qvl`.

The library fetches collateral by itself from the running PCCS and is told of one thing only: the emulated root. Intel's
own root refuses what is made here, and hardware's quote holds under Intel's root alone.
"""

import asyncio
import datetime
import hashlib
import http.client
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import dcap_qvl
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from dstack_emu.attest.collateral import CollateralKey, CollateralKeys
from dstack_emu.attest.errors import FormatError, VerificationError
from dstack_emu.attest.quote import Quote
from dstack_emu.attest.verify import TrustAnchor, verify_quote
from dstack_emu.deployment.guest_config import GuestConfig, power_on
from dstack_emu.simulator.image import OsImage
from dstack_emu.simulator.intel import Intel
from dstack_emu.simulator.pccs import pccs_app
from dstack_emu.simulator.platform import TCB_STATUSES, Platform, PlatformState, TcbStatus
from dstack_emu.simulator.seed import DEFAULT_SEED, Seed
from dstack_emu.simulator.trust_domain import (
    TD_ATTRIBUTES,
    TD_ATTRIBUTES_DEBUG,
    AppCompose,
    DomainSettings,
    TrustDomain,
)
from dstack_emu.simulator.vendor_state import VendorState
from dstack_emu.transport.listen import bind_tcp, serve
from tests import foreign
from tests.hardware import INTEL_COLLATERAL, INTEL_QUOTE
from tests.recorded import external_path
from tests.running import RunningStack

REPORT_DATA = bytes(range(64))
AGENTS = ("agent-src", "agent-dst", "app")
ADVISORIES = ("INTEL-SA-00837", "INTEL-SA-00960")


def now() -> int:
    """Unix seconds."""
    return int(time.time())


def root_of(stack: RunningStack) -> bytes:
    """The emulated root of a stack, DER."""
    pem = Path(stack.description["root_ca"]).read_bytes()
    return x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)


def quote_by(stack: RunningStack, agent: str) -> bytes:
    """A quote of one of the stack's agents."""
    answer = foreign.ask_agent(stack.services[agent], "GetQuote", {"report_data": REPORT_DATA.hex()})
    return bytes.fromhex(answer["quote"])


# ---- quotes of a running stack


@pytest.mark.parametrize("agent", AGENTS)
async def test_quote_of_an_agent_is_up_to_date(ready_stack: RunningStack, agent: str) -> None:
    quote = quote_by(ready_stack, agent)
    collateral = await dcap_qvl.get_collateral(ready_stack.services["pccs"], quote)
    verified = dcap_qvl.verify_with_root_ca(quote, collateral, root_of(ready_stack), now())
    assert (verified.status, list(verified.advisory_ids)) == ("UpToDate", [])
    report = json.loads(verified.to_json())["report"]["TD10"]
    assert report["report_data"] == REPORT_DATA.hex()
    device_id = hashlib.sha256(verified.ppid).hexdigest()
    assert device_id == foreign.ask_agent(ready_stack.services[agent], "Info")["device_id"]
    if agent != "app":
        assert device_id == ready_stack.description["kms"][agent.removeprefix("agent-")]["device_id"]


def test_each_agent_is_on_a_machine_of_its_own(ready_stack: RunningStack) -> None:
    infos = [foreign.ask_agent(ready_stack.services[agent], "Info") for agent in AGENTS]
    assert len({info["device_id"] for info in infos}) == 3
    quotes = [dcap_qvl.parse_quote(quote_by(ready_stack, agent)) for agent in AGENTS]
    assert len({quote.fmspc() for quote in quotes}) == 3
    assert {quote.ca() for quote in quotes} == {"platform"}


async def test_quote_of_an_agent_is_refused_under_intels_root(ready_stack: RunningStack) -> None:
    quote = quote_by(ready_stack, "app")
    collateral = await dcap_qvl.get_collateral(ready_stack.services["pccs"], quote)
    with pytest.raises(ValueError, match="InvalidCrlSignatureForPublicKey"):
        dcap_qvl.verify(quote, collateral, now())
    with pytest.raises(VerificationError, match="InvalidCrlSignatureForPublicKey"):
        verify_quote(quote, collateral, TrustAnchor.intel(), now())
    assert verify_quote(quote, collateral, TrustAnchor(root_of(ready_stack)), now()).tcb_status == "UpToDate"


async def test_quote_of_one_machine_is_refused_with_collateral_of_another(ready_stack: RunningStack) -> None:
    theirs = await dcap_qvl.get_collateral(ready_stack.services["pccs"], quote_by(ready_stack, "agent-src"))
    document = json.loads(theirs.to_json())
    document.pop("pck_certificate_chain", None)  # or the library judges that chain in place of the quote's own
    collateral = dcap_qvl.QuoteCollateralV3.from_json(json.dumps(document))
    with pytest.raises(ValueError, match="Fmspc mismatch"):
        dcap_qvl.verify_with_root_ca(quote_by(ready_stack, "app"), collateral, root_of(ready_stack), now())


# ---- a quote of real hardware


@dataclass(frozen=True)
class Hardware:
    """A quote of an Intel machine, its collateral, and a time at which both were valid."""

    quote: bytes
    collateral: dcap_qvl.QuoteCollateralV3
    time: int


@pytest.fixture
def hardware() -> Hardware:
    """The recorded quote of an Intel machine."""
    text = external_path(INTEL_COLLATERAL).read_text()
    collateral = dcap_qvl.QuoteCollateralV3.from_json(text)
    issued = datetime.datetime.fromisoformat(json.loads(collateral.tcb_info)["issueDate"])
    day_after = int((issued + datetime.timedelta(days=1)).timestamp())
    return Hardware(external_path(INTEL_QUOTE).read_bytes(), collateral, day_after)


def test_hardware_quote_holds_under_intels_root(hardware: Hardware) -> None:
    verified = verify_quote(hardware.quote, hardware.collateral, TrustAnchor.intel(), hardware.time)
    judged = dcap_qvl.verify(hardware.quote, hardware.collateral, hardware.time)
    assert verified.tcb_status == judged.status
    assert verified.advisory_ids == tuple(judged.advisory_ids)
    assert verified.ppid == bytes(judged.ppid)
    assert verified.report.report_data.hex() == json.loads(judged.to_json())["report"]["TD10"]["report_data"]


def test_hardware_quote_is_refused_under_the_emulated_root(hardware: Hardware) -> None:
    emulated = TrustAnchor.of(Intel(Seed.of("any")).root)
    with pytest.raises(VerificationError, match="InvalidCrlSignatureForPublicKey"):
        verify_quote(hardware.quote, hardware.collateral, emulated, hardware.time)


def test_hardware_quote_is_refused_when_its_collateral_is_past(hardware: Hardware) -> None:
    with pytest.raises(VerificationError, match="CrlExpired"):
        verify_quote(hardware.quote, hardware.collateral, TrustAnchor.intel(), hardware.time + 365 * 86400)


# ---- what the vendor says


class World:
    """A vendor whose word can be changed, its PCCS, and a trust domain on one of its machines."""

    def __init__(self) -> None:
        seed = Seed.of("test_dcap")
        self.intel = Intel(seed)
        self.platform: Platform = self.intel.platform("machine")
        image, instance = OsImage.from_seed(seed.derive), seed.derive("instance", 32)
        self.domain = TrustDomain(self.platform, image, AppCompose.named("app"), instance_seed=instance)
        self.url = ""

    async def verify(self, version: int = 4) -> dcap_qvl.VerifiedReport:
        """Quote, and have the library fetch collateral and judge."""
        quote = self.platform.quote(self.domain.report(REPORT_DATA), version)
        collateral = await dcap_qvl.get_collateral(self.url, quote)
        return dcap_qvl.verify_with_root_ca(quote, collateral, self.intel.root_der, now())

    async def refusal(self) -> str:
        """The text of the library's refusal."""
        with pytest.raises(ValueError, match="Verification failed") as error:
            await self.verify()
        return str(error.value)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """A vendor with a listening PCCS, everything in order."""
    world = World()
    server = await serve(pccs_app(world.intel), bind_tcp("127.0.0.1", 0))
    world.url = server.url
    yield world
    await server.close()


@pytest.mark.parametrize("status", [status for status in TCB_STATUSES if status != "Revoked"])
async def test_platform_has_the_status_that_the_vendor_gives_it(world: World, status: TcbStatus) -> None:
    world.platform.state = PlatformState(tcb_status=status, advisory_ids=ADVISORIES)
    verified = await world.verify()
    assert (verified.status, tuple(verified.advisory_ids)) == (status, ADVISORIES)
    world.platform.state = PlatformState()
    verified = await world.verify()
    assert (verified.status, tuple(verified.advisory_ids)) == ("UpToDate", ())


@pytest.mark.parametrize("part", ["quoting enclave", "TDX module"])
async def test_part_of_the_platform_that_is_out_of_date_makes_it_so(world: World, part: str) -> None:
    if part == "TDX module":
        world.platform.state = PlatformState(module_status="OutOfDate", module_advisory_ids=ADVISORIES)
    else:
        world.intel.state = VendorState(qe_status="OutOfDate", qe_advisory_ids=ADVISORIES)
    verified = await world.verify()
    assert (verified.status, tuple(verified.advisory_ids)) == ("OutOfDate", ADVISORIES)


@pytest.mark.parametrize("kind", [PlatformState, VendorState])
def test_status_that_no_verifier_knows_of_a_part_is_refused(kind: type) -> None:
    name, of = ("module_status", "TDX module") if kind is PlatformState else ("qe_status", "quoting enclave")
    expected = f"TCB status of the {of}: one of UpToDate, OutOfDate, Revoked expected, got 'SWHardeningNeeded'"
    with pytest.raises(FormatError) as error:
        kind(**{name: "SWHardeningNeeded"})
    assert str(error.value) == expected


async def test_quote_with_a_td15_report_holds(world: World) -> None:
    domain = TrustDomain(
        world.platform,
        world.domain.image,
        AppCompose.named("app"),
        instance_seed=bytes(32),
        settings=DomainSettings(quote_version=5, td15=True, mr_config_id=b"m" * 48),
    )
    quote = domain.attest(REPORT_DATA).quote
    collateral = await dcap_qvl.get_collateral(world.url, quote)
    verified = dcap_qvl.verify_with_root_ca(quote, collateral, world.intel.root_der, now())
    assert verified.status == "UpToDate"
    assert json.loads(verified.to_json())["report"]["TD15"]["base"]["mr_config_id"] == (b"m" * 48).hex()


ATTRIBUTES = {
    "debug": (TD_ATTRIBUTES_DEBUG, "Debug mode is enabled"),
    "no SEPT_VE_DISABLE": (bytes(8), "SEPT_VE_DISABLE is not enabled"),
    "migration": (bytes((*TD_ATTRIBUTES[:3], TD_ATTRIBUTES[3] | 0x20, *TD_ATTRIBUTES[4:])), "TD migration is enabled"),
    "a reserved bit": (bytes((*TD_ATTRIBUTES[:7], 1)), "Reserved bits in TD attributes are set"),
}


@pytest.mark.parametrize(("attributes", "said"), ATTRIBUTES.values(), ids=ATTRIBUTES)
def test_kms_refuses_attributes_that_weaken_a_domain(ready_stack: RunningStack, attributes: bytes, said: str) -> None:
    guest = foreign.Guest.of(ready_stack.services["kms-src"], ready_stack.services["app"])
    domain = power_on(Intel(Seed.of(DEFAULT_SEED)), GuestConfig())
    key = foreign.new_key()
    evidence = domain.attest(foreign.binding_of(foreign.spki_of(key)))
    weak = replace(Quote.parse(evidence.quote).report, td_attributes=attributes)
    weakened = replace(evidence, quote=domain.platform.quote(weak)).encode()
    refusal = guest.get_app_key(guest.temp_ca.issue(key, weakened)).error
    assert refusal == f"invalid quote: failed to verify TDX quote: {said}"
    assert guest.get_app_key(guest.temp_ca.issue(key, evidence.encode())).status == 200


async def test_revoked_platform_is_refused(world: World) -> None:
    world.platform.state = PlatformState(tcb_status="Revoked")
    assert "TCB status is invalid: Revoked" in await world.refusal()
    world.platform.state = PlatformState()
    assert (await world.verify()).status == "UpToDate"


# Header and body, the signature over them, attestation key, QE report, its signature, QE authentication data.
SIGNED_REGIONS = ((0, 632), (636, 700), (700, 764), (770, 1154), (1154, 1218), (1220, 1252))


async def test_quote_with_any_byte_of_its_signed_regions_changed_is_refused(world: World) -> None:
    quote = world.platform.quote(world.domain.report(REPORT_DATA))
    collateral, root = await dcap_qvl.get_collateral(world.url, quote), world.intel.root_der
    assert dcap_qvl.verify_with_root_ca(quote, collateral, root, now()).status == "UpToDate"
    held = []
    for offset in (offset for start, end in SIGNED_REGIONS for offset in range(start, end)):
        changed = bytearray(quote)
        changed[offset] ^= 0x01
        try:
            dcap_qvl.verify_with_root_ca(bytes(changed), collateral, root, now())
        except ValueError:
            continue
        held.append(offset)
    assert held == []


async def test_quote_with_a_bit_of_any_byte_changed_holds_if_it_does_for_the_library(world: World) -> None:
    quote = world.platform.quote(world.domain.report(REPORT_DATA))
    collateral, root = await dcap_qvl.get_collateral(world.url, quote), world.intel.root_der
    of_type = range(764, 766)

    def verify(data: bytes) -> None:
        CollateralKeys().of_quote(data)
        verify_quote(data, collateral, TrustAnchor(root), now())

    for offset in range(len(quote)):
        changed = bytearray(quote)
        changed[offset] ^= 0x80
        data = bytes(changed)
        try:
            # The library fetches collateral for each quote, and so reads the chain inside; ours does it as `verify`.
            CollateralKey.of_quote(data)
            dcap_qvl.verify_with_root_ca(data, collateral, root, now())
        except (ValueError, FormatError):
            assert offset not in of_type
            with pytest.raises((FormatError, VerificationError)):
                verify(data)
        else:
            verify(data)
            assert Quote.parse(data).encode() == data


@pytest.mark.parametrize("version", [4, 5])
async def test_quote_of_each_version_holds(world: World, version: int) -> None:
    assert (await world.verify(version)).status == "UpToDate"


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (PlatformState(pck_revoked=True), "CertRevoked"),
        (PlatformState(module_status="Revoked"), "Revoked"),
        (PlatformState(other_root=True), "InvalidSignatureForPublicKey"),
        (VendorState(pck_ca_revoked=True), "CertRevoked"),
        (VendorState(qe_status="Revoked"), "Revoked"),
        (VendorState(tcb_info_dating="expired"), "TCBInfo expired"),
        (VendorState(qe_identity_dating="expired"), "QE Identity expired"),
        (VendorState(pck_crl_dating="expired"), "CrlExpired"),
        (VendorState(root_ca_crl_dating="expired"), "CrlExpired"),
        (VendorState(tcb_info_dating="not-yet-valid"), "TCBInfo issue date is in the future"),
        (VendorState(qe_identity_dating="not-yet-valid"), "QE Identity issue date is in the future"),
    ],
    ids=str,
)
async def test_quote_is_refused_for_what_the_vendor_says(
    world: World, state: PlatformState | VendorState, reason: str
) -> None:
    holder: Any = world.platform if isinstance(state, PlatformState) else world.intel
    holder.state = state
    assert reason in await world.refusal()
    holder.state = replace(type(state)())
    assert (await world.verify()).status == "UpToDate"


async def test_state_of_one_platform_is_not_anothers(world: World) -> None:
    world.intel.platform("another").state = PlatformState(tcb_status="OutOfDate", pck_revoked=True)
    assert (await world.verify()).status == "UpToDate"


# ---- the PCCS


@dataclass(frozen=True)
class Page:
    """An answer of the PCCS."""

    status: int
    headers: dict[str, str]
    body: bytes


def get(stack: RunningStack, path: str, **headers: str) -> Page:
    """GET a page of a stack's PCCS."""
    connection = http.client.HTTPConnection(urlsplit(stack.services["pccs"]).netloc, timeout=10)
    try:
        connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return Page(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    finally:
        connection.close()


@pytest.fixture
def fmspc(ready_stack: RunningStack) -> str:
    """The FMSPC of the app's machine, as a verifier reads it."""
    return str(dcap_qvl.parse_quote(quote_by(ready_stack, "app")).fmspc())


def documents(fmspc: str) -> list[str]:
    """The four documents, by the spellings that verifiers use."""
    return [
        "/sgx/certification/v4/pckcrl?ca=platform&encoding=der",
        f"/tdx/certification/v4/tcb?fmspc={fmspc}",
        "/tdx/certification/v4/qe/identity",
        "/sgx/certification/v4/rootcacrl",
    ]


def test_pccs_answers_not_modified_to_a_known_etag(ready_stack: RunningStack, fmspc: str) -> None:
    etags = set()
    for path in documents(fmspc):
        page = get(ready_stack, path)
        assert page.status == 200
        etags.add(page.headers["etag"])
        known = get(ready_stack, path, If_None_Match=page.headers["etag"])
        assert (known.status, known.body, known.headers["etag"]) == (304, b"", page.headers["etag"])
        other = get(ready_stack, path, If_None_Match='"another"')
        assert (other.status, other.body) == (200, page.body)
    assert len(etags) == 4


@pytest.mark.parametrize("unknown", ["000000000000", "00", "zz", "", "50806F000000"])
def test_pccs_refuses_an_fmspc_that_is_not_of_this_world(ready_stack: RunningStack, unknown: str) -> None:
    page = get(ready_stack, f"/tdx/certification/v4/tcb?fmspc={unknown}")
    assert page.status == 404
    assert f"has the FMSPC '{unknown}'" in json.loads(page.body)["error"]


def test_pccs_says_the_same_under_every_spelling(ready_stack: RunningStack, fmspc: str) -> None:
    tcb = [
        get(ready_stack, f"/{product}/certification/v4/tcb?{query}")
        for product in ("tdx", "sgx")
        for query in (
            f"fmspc={fmspc}",
            f"fmspc={fmspc.lower()}",
            f"fmspc={fmspc.upper()}&update=standard",
            f"fmspc={fmspc}&update=early",
        )
    ]
    identity = [
        get(ready_stack, f"/{product}/certification/v4/qe/identity{query}")
        for product in ("tdx", "sgx")
        for query in ("", "?update=standard")
    ]
    for pages in (tcb, identity):
        assert {page.status for page in pages} == {200}
        assert len({page.body for page in pages}) == 1
    info = json.loads(tcb[0].body)["tcbInfo"]
    assert (info["id"], info["fmspc"].upper()) == ("TDX", fmspc.upper())
    assert json.loads(identity[0].body)["enclaveIdentity"]["id"] == "TD_QE"


def test_pccs_sends_issuer_chains_under_every_name(ready_stack: RunningStack, fmspc: str) -> None:
    root = Path(ready_stack.description["root_ca"]).read_text()
    names = {
        0: ["sgx-pck-crl-issuer-chain"],
        1: ["tcb-info-issuer-chain", "sgx-tcb-info-issuer-chain"],
        2: ["sgx-enclave-identity-issuer-chain"],
    }
    paths = documents(fmspc)
    for index, headers in names.items():
        page = get(ready_stack, paths[index])
        for header in headers:
            chain = x509.load_pem_x509_certificates(unquote(page.headers[header]).encode())
            assert len(chain) == 2
            chain[0].verify_directly_issued_by(chain[1])
            assert chain[1].public_bytes(Encoding.PEM).decode() == root


def test_pccs_crls_are_signed_and_in_their_encodings(ready_stack: RunningStack, fmspc: str) -> None:
    root = x509.load_pem_x509_certificate(Path(ready_stack.description["root_ca"]).read_bytes())
    paths = documents(fmspc)
    pck = get(ready_stack, paths[0])
    pck_ca = x509.load_pem_x509_certificates(unquote(pck.headers["sgx-pck-crl-issuer-chain"]).encode())[0]
    assert x509.load_der_x509_crl(pck.body).is_signature_valid(pck_ca.public_key())  # type: ignore[arg-type]  # it is P-256
    text = get(ready_stack, paths[3]).body.decode()
    assert text == text.strip()
    assert x509.load_der_x509_crl(bytes.fromhex(text)).is_signature_valid(root.public_key())  # type: ignore[arg-type]  # so is it


async def test_pccs_serves_many_verifiers_at_once(ready_stack: RunningStack) -> None:
    quotes = [quote_by(ready_stack, agent) for agent in AGENTS] * 8
    pccs = ready_stack.services["pccs"]
    collaterals = await asyncio.gather(*(dcap_qvl.get_collateral(pccs, quote) for quote in quotes))
    root = root_of(ready_stack)
    statuses = {
        dcap_qvl.verify_with_root_ca(quote, collateral, root, now()).status
        for quote, collateral in zip(quotes, collaterals, strict=True)
    }
    assert statuses == {"UpToDate"}
