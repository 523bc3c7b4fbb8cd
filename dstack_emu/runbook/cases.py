"""The five test cases, step by step.

Source: dstack's runbook for KMS self authorization and quote-required KMS behaviour. What is asked here beyond it is
case 4 for the RPCs that take an attested client, and case 5: in place of "use the simulator", that no way without a
quote is open.
"""

from collections.abc import Awaitable, Callable
from typing import Final

from dstack_emu.attest.attestation import Attestation, decode
from dstack_emu.attest.certificate import USAGE_KMS_RPC
from dstack_emu.attest.errors import AttestError
from dstack_emu.attest.report_data import bootstrap_report_data
from dstack_emu.attest.verify import VerifiedAttestation
from dstack_emu.deployment.policy_files import DENY_ALL
from dstack_emu.kms_emu.errors import KmsError
from dstack_emu.runbook.attested_client import AttestedClient, altered
from dstack_emu.runbook.runner import BlockedError, RunbookRun
from dstack_emu.runbook.target import SIDES
from dstack_emu.runbook.transcript import Expected, answers, refused, short

DOMAINS: Final = {side: f"kms-{side}.example.test" for side in SIDES}
APP_KEY: Final = {"api_version": 1}

NOT_ALLOWED: Final = refused("not allowed", "denied")
SELF_DENIED: Final = refused("self authorization failed", "KMS is not allowed")
NO_ATTESTATION: Final = refused("No attestation provided")
NO_APP: Final = "no agent of an app is named (services.app)"


async def carry_out(book: RunbookRun) -> None:
    """Make every case. What cannot be judged for want of an earlier success is said so, and the rest goes on."""
    for number, (title, case) in enumerate(CASES):
        book.journal.begin(number, title)
        try:
            await case(book)
        except BlockedError as error:
            book.journal.note("the rest of this case", str(error), "", None)
        except (KmsError, AttestError) as error:
            book.journal.note("evidence for an attested client", str(error), "evidence, and a certificate", ok=False)


async def prepare(book: RunbookRun) -> None:
    """Both KMS answer and have no keys, both webhooks answer, and both policies deny."""
    for side in SIDES:
        await book.wait_until_fresh(side)
    for side in SIDES:
        await book.apply(side, "deny-all", DENY_ALL)
    for side in SIDES:
        answer = await book.call(side, "Onboard.GetAttestationInfo", MEASURED, keep=f"kms-{side}-attestation")
        if not MEASURED.holds(answer):
            raise BlockedError(f"kms-{side} does not say what it measures")
        book.measured[side] = answer.body


async def bootstrap_denied(book: RunbookRun) -> None:
    """Case 1: a KMS asks about itself before it makes keys."""
    _require_measured(book)
    for name, policy in (("deny-all", None), ("deny-self", book.deny_by_measurement("src"))):
        if policy is not None:
            await book.apply("src", name, policy)
        await _bootstrap(book, NOT_ALLOWED, f"bootstrap-src-denied-by-{name}")


async def bootstrap_allowed(book: RunbookRun) -> None:
    """Case 2: once its own measurement is allowed, it makes keys, and starts over with them."""
    _require_measured(book)
    await book.apply("src", "allow-self", book.allow("src"))
    await _bootstrap(book, answers("ca_pubkey", "k256_pubkey", "attestation"), "bootstrap-src-allowed")
    if book.bootstrap is None:
        raise BlockedError("kms-src has no keys")
    if not await book.finish("src"):
        raise BlockedError("kms-src does not run")


async def onboarding(book: RunbookRun) -> None:
    """Case 3: a KMS takes no keys from a source that it denies, and a source gives none to a KMS that it denies."""
    _require_running(book)
    await book.apply("src", "allow-both", book.allow("src", "dst"))
    await book.apply("dst", "deny-src", book.deny_by_measurement("src"))
    await _onboard(book, NOT_ALLOWED, "onboard-dst-denied")
    await book.apply("src", "allow-self", book.allow("src"))
    await book.apply("dst", "allow-src", book.allow("src"))
    await _onboard(book, NOT_ALLOWED, "onboard-dst-denied-by-src")
    await book.apply("src", "allow-both", book.allow("src", "dst"))
    wanted = answers(k256_pubkey=book.meta["src"].field("k256_pubkey"))
    await _onboard(book, wanted, "onboard-dst-allowed")
    if book.onboarded is None:
        raise BlockedError("kms-dst has no keys")
    if not await book.finish("dst"):
        raise BlockedError("kms-dst does not run")


async def trusted_rpcs(book: RunbookRun) -> None:
    """Case 4: a KMS that runs asks about itself before every trusted RPC."""
    _require_running(book)
    temp_ca = await book.call("src", "KMS.GetTempCaCert", TEMP_CA, keep="get-temp-ca-allowed")
    client = await book.make_client(temp_ca) if TEMP_CA.holds(temp_ca) else None
    allowed = book.allow("src", "dst", app=True)
    if client is None:
        book.journal.note("GetAppKey, SignCert and GetKmsKey", NO_APP, "refused while the KMS denies itself", None)
    else:
        await book.apply("src", "allow-both-and-app", allowed)
        await _ask_attested(book, client, "allowed", answers("k256_key", "disk_crypt_key"), CHAIN, PAST_THE_SELF_CHECK)
    await book.apply("src", "deny-self", book.deny_by_measurement("src"))
    await book.call("src", "KMS.GetTempCaCert", SELF_DENIED, keep="get-temp-ca-denied")
    if client is not None:
        await _ask_attested(book, client, "denied", SELF_DENIED, SELF_DENIED, SELF_DENIED)
    await book.call("src", "KMS.GetMeta", answers("ca_cert"), keep="get-meta-while-denied")
    await book.apply("src", "allow-both-and-app" if client else "allow-both", allowed)
    await book.call("src", "KMS.GetTempCaCert", TEMP_CA, keep="get-temp-ca-allowed-again")


async def quotes_required(book: RunbookRun) -> None:
    """Case 5: nothing passes without a quote, and what the KMS itself say is quoted."""
    _require_running(book)
    for side in SIDES:
        if side in book.meta:
            await _check_certificate(book, side)
    await _check_bootstrap(book)
    await _ask_verifier(book)
    nobody = "without a client certificate"
    await book.call("src", "KMS.GetAppKey", NO_ATTESTATION, arguments=APP_KEY, by=nobody, keep="get-app-key-bare")
    await book.call("src", "KMS.GetKmsKey", NO_ATTESTATION, by=nobody, keep="get-kms-key-bare")
    client = book.client
    if client is None:
        book.journal.note("GetAppKey with evidence of several kinds", NO_APP, "only evidence that holds passes", None)
        return
    kinds = (
        ("no evidence in the certificate", "no-evidence", client.identity_without_evidence(), NO_ATTESTATION),
        (
            "evidence of another key",
            "evidence-of-another-key",
            await client.identity_with_stolen_evidence(),
            refused("report data mismatch", "report_data"),
        ),
        (
            "one bit of the quote changed",
            "altered-quote",
            await client.identity(forged=True),
            refused("quote", "attestation"),
        ),
        ("evidence that holds", "evidence", await client.identity(), answers("k256_key", "disk_crypt_key")),
    )
    for by, name, identity, expected in kinds:
        keep = f"get-app-key-{name}"
        await book.call("src", "KMS.GetAppKey", expected, arguments=APP_KEY, identity=identity, by=by, keep=keep)
    request = await client.signing_request(forged=True)
    expected = refused("quote", "attestation")
    await book.call("src", "KMS.SignCert", expected, arguments=request, by="one bit of the quote changed")


CASES: Final[tuple[tuple[str, Callable[[RunbookRun], Awaitable[None]]], ...]] = (
    ("preparations", prepare),
    ("bootstrap is denied when self is not allowed", bootstrap_denied),
    ("bootstrap succeeds after self is allowed", bootstrap_allowed),
    ("the receiver rejects onboarding from a denied source", onboarding),
    ("trusted RPCs fail when the running KMS is no longer allowed", trusted_rpcs),
    ("nothing passes without a quote", quotes_required),
)
"""Title and steps of each, by number; 0 is the shared setup."""


# ---- what is expected in several places

_HEX_64: Final = ("device_id", "mr_aggregated", "os_image_hash")
TEMP_CA: Final = answers("temp_ca_cert", "temp_ca_key", "ca_cert")
CHAIN: Final = answers("certificate_chain")
PAST_THE_SELF_CHECK: Final = Expected(
    "keys or a refusal of this client, none of the KMS itself",
    lambda answer: answer.status > 0 and not SELF_DENIED.holds(answer),
)
"""The app is no KMS: that it gets no root keys has another reason than case 4's."""


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


MEASURED: Final = Expected(
    f"with 64 hex digits each as {', '.join(_HEX_64)}, and attestation_mode",
    lambda answer: all(_is_hash(answer.field(name)) for name in _HEX_64) and bool(answer.field("attestation_mode")),
    is_success=True,
)


IS_VALID: Final = Expected("with is_valid = true", lambda answer: answer.field("is_valid") is True, is_success=True)
IS_NOT_VALID: Final = Expected(
    "with is_valid = false and a reason",
    lambda answer: answer.field("is_valid") is False and bool(answer.field("reason")),
    is_success=True,
)


def _require_measured(book: RunbookRun) -> None:
    if len(book.measured) < len(SIDES):
        raise BlockedError("it is not known what both KMS measure")


def _require_running(book: RunbookRun) -> None:
    _require_measured(book)
    if "src" not in book.meta:
        raise BlockedError("kms-src does not run")


# ---- steps that several cases share


async def _bootstrap(book: RunbookRun, expected: Expected, keep: str) -> None:
    if book.bootstrap is not None:
        wanted = expected.words(book.bootstrap.success)
        book.journal.note("kms-src Onboard.Bootstrap", "it has made keys before", wanted, None)
        return
    answer = await book.call("src", "Onboard.Bootstrap", expected, arguments={"domain": DOMAINS["src"]}, keep=keep)
    if answer.ok:
        book.bootstrap = answer


async def _onboard(book: RunbookRun, expected: Expected, keep: str) -> None:
    if book.onboarded is not None:
        wanted = expected.words(book.onboarded.success)
        book.journal.note("kms-dst Onboard.Onboard", "it has taken keys before", wanted, None)
        return
    arguments = {"source_url": book.target.source_url, "domain": DOMAINS["dst"]}
    answer = await book.call("dst", "Onboard.Onboard", expected, arguments=arguments, keep=keep)
    if answer.ok:
        book.onboarded = answer


async def _ask_attested(
    book: RunbookRun, client: AttestedClient, name: str, app_key: Expected, sign: Expected, kms_key: Expected
) -> None:
    """Ask the three RPCs that take evidence, as the app."""
    identity, by = await client.identity(), "with evidence"
    keep = f"get-app-key-{name}"
    await book.call("src", "KMS.GetAppKey", app_key, arguments=APP_KEY, identity=identity, by=by, keep=keep)
    request = await client.signing_request()
    await book.call("src", "KMS.SignCert", sign, arguments=request, by=by, keep=f"sign-cert-{name}")
    await book.call("src", "KMS.GetKmsKey", kms_key, identity=identity, by=by, keep=f"get-kms-key-{name}")


async def _check_certificate(book: RunbookRun, side: str) -> None:
    """The certificate that a KMS shows carries evidence that holds, bound to its key; what it measures is in there."""
    asked = f"the certificate of kms-{side}, judged by dcap-qvl with the PCCS's collateral"
    expected = f"evidence under {book.target.root}, bound to its key, usage {USAGE_KMS_RPC}"
    if book.verifier is None:
        book.journal.note(asked, "no PCCS is named (services.pccs)", expected, None)
        return
    try:
        peer = await book.peer(side)
    except AttestError as error:
        book.journal.note(asked, str(error), expected, ok=False)
        return
    got = "no evidence" if peer.attestation is None else f"{peer.attestation.quote.tcb_status} quote"
    ok = peer.attestation is not None and peer.usage == USAGE_KMS_RPC
    book.journal.note(asked, f"{got}, usage {peer.usage}", expected, ok)
    if peer.attestation is not None:
        _compare_measured(book, side, peer.attestation)


def _compare_measured(book: RunbookRun, side: str, evidence: VerifiedAttestation) -> None:
    info, stated = evidence.app_info(), book.measured[side]
    quoted = {"mr_aggregated": info.mr_aggregated.hex(), "device_id": info.device_id.hex()}
    if info.os_image_hash:  # evidence of old releases names no image
        quoted["os_image_hash"] = info.os_image_hash.hex()
    differing = [name for name, value in quoted.items() if stated[name] != value]
    got = f"{', '.join(differing)} differ" if differing else f"the same {', '.join(quoted)}"
    asked = f"what kms-{side} said it measures, against that quote"
    book.journal.note(asked, got, "the quoted values", not differing)


async def _check_bootstrap(book: RunbookRun) -> None:
    """The attestation of the bootstrap holds, and binds the keys that were made."""
    asked, expected = "the attestation of the bootstrap", f"evidence under {book.target.root} that binds both keys"
    if book.verifier is None or book.bootstrap is None:
        book.journal.note(asked, "no PCCS is named (services.pccs)", expected, None)
        return
    try:
        evidence: Attestation = (await book.verify_hex(book.bootstrap.field("attestation"))).attestation
        ca_pubkey, k256_pubkey = (bytes.fromhex(book.bootstrap.field(name)) for name in ("ca_pubkey", "k256_pubkey"))
    except (AttestError, ValueError, TypeError) as error:
        book.journal.note(asked, str(error), expected, ok=False)
        return
    binds = evidence.report_data == bootstrap_report_data(ca_pubkey, k256_pubkey)
    got = "binds both keys" if binds else f"report_data {short(evidence.report_data.hex())}"
    book.journal.note(asked, got, expected, binds)


async def _ask_verifier(book: RunbookRun) -> None:
    """A verifier, which is told nothing else, comes to the same verdict, and to another one about other bytes."""
    verifier, bootstrap = book.target.verifier, book.bootstrap
    if verifier is None or bootstrap is None:
        missing = "no verifier is named (services.verifier)" if verifier is None else "kms-src did not bootstrap"
        book.journal.note("the verifier about the attestation of the bootstrap", missing, IS_VALID.text, None)
        return
    try:
        evidence = decode(bytes.fromhex(bootstrap.field("attestation")))
    except (AttestError, ValueError, TypeError):
        return  # which the step before has told
    for about, name, attestation, expected in (
        ("the attestation of the bootstrap", "verify-bootstrap", evidence, IS_VALID),
        ("it with one bit of the quote changed", "verify-altered-bootstrap", altered(evidence), IS_NOT_VALID),
    ):
        document = {"attestation": attestation.encode().hex()}
        await book.post(f"verifier/verify, {about}", f"{verifier}/verify", document, expected, keep=name)
