"""The five test cases, step by step.

Source: dstack's runbook for KMS self authorization and quote-required KMS behaviour. Two things go beyond it: case 4
also calls the RPCs that take an attested client, and case 5, in place of "use the simulator", checks that nothing
passes without a quote.
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
from dstack_emu.runbook.transcript import Expected, answers, refuses, short

DOMAINS: Final = {side: f"kms-{side}.example.test" for side in SIDES}
APP_KEY: Final = {"api_version": 1}

NOT_ALLOWED: Final = refuses("not allowed", "denied")
SELF_DENIALS: Final = ("self authorization failed", "KMS is not allowed")
SELF_DENIED: Final = refuses(*SELF_DENIALS)
HANDSHAKE_REFUSED: Final = ("HANDSHAKE", "TSI_")
"""The texts by which OpenSSL and grpcio report the TLS alert that refuses a client certificate."""
NO_ATTESTATION: Final = refuses("No attestation provided")
NO_HANDOVER: Final = "public KMS key handover is disabled"
"""The text of a source that hands its root keys over on its admin listener alone."""
NOT_ATTESTED: Final = Expected(
    "an error that says 'No attestation provided', or (from 0.6 on) a TLS handshake that the server refuses",
    lambda answer: NO_ATTESTATION.holds(answer) or (answer.status == 0 and _is_handshake_refusal(answer.body)),
)
"""The expected answer to a client certificate without evidence."""
NO_APP: Final = "the target names no app's agent (services.app)"


def _of_kms_key(run: RunbookRun, *reasons: str) -> Expected:
    """Expect GetKmsKey to be refused; a source with a token may hand its keys over on its admin listener alone."""
    return refuses(*reasons, *([NO_HANDOVER] if run.source_token else []))


def _is_handshake_refusal(body: object) -> bool:
    return any(mark in str(body).upper() for mark in HANDSHAKE_REFUSED)


async def run_cases(run: RunbookRun) -> None:
    """Run every case; record what cannot be checked because an earlier step failed, and go on with the next case."""
    for number, (title, case) in enumerate(CASES):
        run.transcript.begin(number, title)
        try:
            await case(run)
        except BlockedError as error:
            run.transcript.record("the rest of this case", str(error), "", None)
        except (KmsError, AttestError) as error:
            run.transcript.record(
                "evidence for an attested client", str(error), "evidence, and a certificate", ok=False
            )


async def preparations(run: RunbookRun) -> None:
    """Check that both KMS answer and have no keys, that both webhooks answer, and that both policies deny."""
    for side in SIDES:
        await run.wait_until_fresh(side)
    for side in SIDES:
        await run.apply_policy(side, "deny-all", DENY_ALL)
    for side in SIDES:
        answer = await run.call(side, "Onboard.GetAttestationInfo", MEASURED, keep=f"kms-{side}-attestation")
        if not MEASURED.holds(answer):
            raise BlockedError(f"kms-{side} does not say what it measures")
        run.measured[side] = answer.body


async def bootstrap_denied(run: RunbookRun) -> None:
    """Check case 1: a KMS requests its webhook's decision about itself before it generates keys."""
    _require_measured(run)
    for name, policy in (("deny-all", None), ("deny-self", run.deny_by_measurement("src"))):
        if policy is not None:
            await run.apply_policy("src", name, policy)
        await _bootstrap(run, NOT_ALLOWED, f"bootstrap-src-denied-by-{name}")


async def bootstrap_allowed(run: RunbookRun) -> None:
    """Check case 2: a KMS whose measurement is allowed generates keys and restarts with them."""
    _require_measured(run)
    await run.apply_policy("src", "allow-self", run.allow("src"))
    await _bootstrap(run, answers("ca_pubkey", "k256_pubkey", "attestation"), "bootstrap-src-allowed")
    if run.bootstrap is None:
        raise BlockedError("kms-src has no keys")
    if not await run.finish("src"):
        raise BlockedError("kms-src does not run")


async def onboarding(run: RunbookRun) -> None:
    """Check case 3: a KMS takes no keys from a source that it denies, and gives none to a KMS that it denies."""
    _require_running(run)
    await run.apply_policy("src", "allow-both", run.allow("src", "dst"))
    await run.apply_policy("dst", "deny-src", run.deny_by_measurement("src"))
    await _onboard(run, NOT_ALLOWED, "onboard-dst-denied")
    await run.apply_policy("src", "allow-self", run.allow("src"))
    await run.apply_policy("dst", "allow-src", run.allow("src"))
    await _onboard(run, NOT_ALLOWED, "onboard-dst-denied-by-src")
    await run.apply_policy("src", "allow-both", run.allow("src", "dst"))
    expected = answers(k256_pubkey=run.meta["src"].field("k256_pubkey"))
    await _onboard(run, expected, "onboard-dst-allowed")
    if run.onboarded is None:
        raise BlockedError("kms-dst has no keys")
    if not await run.finish("dst"):
        raise BlockedError("kms-dst does not run")


async def trusted_rpcs(run: RunbookRun) -> None:
    """Check case 4: a running KMS requests its webhook's decision about itself before every trusted RPC."""
    _require_running(run)
    temp_ca = await run.call("src", "KMS.GetTempCaCert", TEMP_CA, keep="get-temp-ca-allowed")
    client = await run.make_attested_client(temp_ca) if TEMP_CA.holds(temp_ca) else None
    allowed = run.allow("src", "dst", app=True)
    if client is None:
        run.transcript.record("GetAppKey, SignCert and GetKmsKey", NO_APP, "refused while the KMS denies itself", None)
    else:
        await run.apply_policy("src", "allow-both-and-app", allowed)
        await _call_with_evidence(
            run, client, "allowed", answers("k256_key", "disk_crypt_key"), CHAIN, PAST_THE_SELF_CHECK
        )
    await run.apply_policy("src", "deny-self", run.deny_by_measurement("src"))
    await run.call("src", "KMS.GetTempCaCert", SELF_DENIED, keep="get-temp-ca-denied")
    if client is not None:
        kms_key = _of_kms_key(run, *SELF_DENIALS)
        await _call_with_evidence(run, client, "denied", SELF_DENIED, SELF_DENIED, kms_key)
    await run.call("src", "KMS.GetMeta", answers("ca_cert"), keep="get-meta-while-denied")
    await run.apply_policy("src", "allow-both-and-app" if client else "allow-both", allowed)
    await run.call("src", "KMS.GetTempCaCert", TEMP_CA, keep="get-temp-ca-allowed-again")


async def quotes_required(run: RunbookRun) -> None:
    """Check case 5: nothing passes without a quote, and the quotes confirm what the KMS say about themselves."""
    _require_running(run)
    for side in SIDES:
        if side in run.meta:
            await _check_certificate(run, side)
    await _check_bootstrap(run)
    await _check_by_verifier(run)
    by = "without a client certificate"
    await run.call("src", "KMS.GetAppKey", NO_ATTESTATION, arguments=APP_KEY, by=by, keep="get-app-key-bare")
    await run.call("src", "KMS.GetKmsKey", _of_kms_key(run, "No attestation provided"), by=by, keep="get-kms-key-bare")
    client = run.attested_client
    if client is None:
        run.transcript.record(
            "GetAppKey with evidence of several kinds", NO_APP, "only evidence that holds passes", None
        )
        return
    kinds = (
        ("no evidence in the certificate", "no-evidence", client.identity_without_evidence(), NOT_ATTESTED),
        (
            "evidence of another key",
            "evidence-of-another-key",
            await client.identity_with_stolen_evidence(),
            refuses("report data mismatch", "report_data"),
        ),
        (
            "one bit of the quote changed",
            "altered-quote",
            await client.identity(forged=True),
            refuses("quote", "attestation"),
        ),
        ("evidence that holds", "evidence", await client.identity(), answers("k256_key", "disk_crypt_key")),
    )
    for by, name, identity, expected in kinds:
        keep = f"get-app-key-{name}"
        await run.call("src", "KMS.GetAppKey", expected, arguments=APP_KEY, identity=identity, by=by, keep=keep)
    request = await client.signing_request(forged=True)
    expected = refuses("quote", "attestation")
    await run.call("src", "KMS.SignCert", expected, arguments=request, by="one bit of the quote changed")


CASES: Final[tuple[tuple[str, Callable[[RunbookRun], Awaitable[None]]], ...]] = (
    ("preparations", preparations),
    ("bootstrap is denied when self is not allowed", bootstrap_denied),
    ("bootstrap succeeds after self is allowed", bootstrap_allowed),
    ("the receiver rejects onboarding from a denied source", onboarding),
    ("trusted RPCs fail when the running KMS is no longer allowed", trusted_rpcs),
    ("nothing passes without a quote", quotes_required),
)
"""The title and the function of each case, by number; 0 is the preparation of all."""


# ---- expectations that several cases share

_HEX_64: Final = ("device_id", "mr_aggregated", "os_image_hash")
_VARIANT: Final = ("tee_variant", "attestation_mode")
"""The kind of machine, by its present name and by that of 0.5.x."""
TEMP_CA: Final = answers("temp_ca_cert", "temp_ca_key", "ca_cert")
CHAIN: Final = answers("certificate_chain")
PAST_THE_SELF_CHECK: Final = Expected(
    "keys, or a refusal of this client that is not about the KMS itself",
    lambda answer: answer.status > 0 and not SELF_DENIED.holds(answer),
)
"""The expected answer of GetKmsKey: the app is not a KMS, so it may be refused, but not by the self check of case 4."""


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


MEASURED: Final = Expected(
    f"with 64 hex digits each as {', '.join(_HEX_64)}, and tee_variant or attestation_mode",
    lambda answer: all(_is_hash(answer.field(name)) for name in _HEX_64) and any(map(answer.field, _VARIANT)),
    is_success=True,
)


IS_VALID: Final = Expected("with is_valid = true", lambda answer: answer.field("is_valid") is True, is_success=True)
IS_NOT_VALID: Final = Expected(
    "with is_valid = false and a reason",
    lambda answer: answer.field("is_valid") is False and bool(answer.field("reason")),
    is_success=True,
)


def _require_measured(run: RunbookRun) -> None:
    if len(run.measured) < len(SIDES):
        raise BlockedError("the measurements of both KMS are not known")


def _require_running(run: RunbookRun) -> None:
    _require_measured(run)
    if "src" not in run.meta:
        raise BlockedError("kms-src does not run")


# ---- steps that several cases share


async def _bootstrap(run: RunbookRun, expected: Expected, keep: str) -> None:
    if run.bootstrap is not None:
        text = expected.text_with(run.bootstrap.success)
        run.transcript.record("kms-src Onboard.Bootstrap", "it has generated keys before", text, None)
        return
    answer = await run.call("src", "Onboard.Bootstrap", expected, arguments={"domain": DOMAINS["src"]}, keep=keep)
    if answer.ok:
        run.bootstrap = answer


async def _onboard(run: RunbookRun, expected: Expected, keep: str) -> None:
    if run.onboarded is not None:
        text = expected.text_with(run.onboarded.success)
        run.transcript.record("kms-dst Onboard.Onboard", "it has received keys before", text, None)
        return
    arguments = {"source_url": run.target.source_url, "domain": DOMAINS["dst"]}
    answer = await run.call("dst", "Onboard.Onboard", expected, arguments=arguments, keep=keep)
    if answer.ok:
        run.onboarded = answer


async def _call_with_evidence(
    run: RunbookRun, client: AttestedClient, name: str, app_key: Expected, sign: Expected, kms_key: Expected
) -> None:
    """Call the three RPCs that take evidence, as the app."""
    identity, by = await client.identity(), "with evidence"
    keep = f"get-app-key-{name}"
    await run.call("src", "KMS.GetAppKey", app_key, arguments=APP_KEY, identity=identity, by=by, keep=keep)
    request = await client.signing_request()
    await run.call("src", "KMS.SignCert", sign, arguments=request, by=by, keep=f"sign-cert-{name}")
    await run.call("src", "KMS.GetKmsKey", kms_key, identity=identity, by=by, keep=f"get-kms-key-{name}")


async def _check_certificate(run: RunbookRun, side: str) -> None:
    """Verify the evidence in a KMS's certificate: it binds the key, and quotes the measurements that the KMS stated."""
    subject = f"the certificate of kms-{side}, verified by dcap-qvl with the PCCS's collateral"
    expected = f"evidence under {run.target.root}, bound to its key, usage {USAGE_KMS_RPC}"
    if run.verifier is None:
        run.transcript.record(subject, "the target names no PCCS (services.pccs)", expected, None)
        return
    try:
        server = await run.verify_server(side)
    except AttestError as error:
        run.transcript.record(subject, str(error), expected, ok=False)
        return
    got = "no evidence" if server.attestation is None else f"{server.attestation.quote.tcb_status} quote"
    ok = server.attestation is not None and server.usage == USAGE_KMS_RPC
    run.transcript.record(subject, f"{got}, usage {server.usage}", expected, ok)
    if server.attestation is not None:
        _compare_measured(run, side, server.attestation)


def _compare_measured(run: RunbookRun, side: str, evidence: VerifiedAttestation) -> None:
    info, stated = evidence.app_info(), run.measured[side]
    quoted = {"mr_aggregated": info.mr_aggregated.hex(), "device_id": info.device_id.hex()}
    if info.os_image_hash:  # evidence of old releases names no image
        quoted["os_image_hash"] = info.os_image_hash.hex()
    differing = [name for name, value in quoted.items() if stated[name] != value]
    got = f"{', '.join(differing)} differ" if differing else f"the same {', '.join(quoted)}"
    subject = f"the stated measurements of kms-{side}, compared with that quote"
    run.transcript.record(subject, got, "the quoted values", not differing)


async def _check_bootstrap(run: RunbookRun) -> None:
    """Verify the attestation of the bootstrap, and that it binds the keys that were generated."""
    subject, expected = "the attestation of the bootstrap", f"evidence under {run.target.root} that binds both keys"
    if run.verifier is None or run.bootstrap is None:
        run.transcript.record(subject, "the target names no PCCS (services.pccs)", expected, None)
        return
    try:
        evidence: Attestation = (await run.verify_hex(run.bootstrap.field("attestation"))).attestation
        ca_pubkey, k256_pubkey = (bytes.fromhex(run.bootstrap.field(name)) for name in ("ca_pubkey", "k256_pubkey"))
    except (AttestError, ValueError, TypeError) as error:
        run.transcript.record(subject, str(error), expected, ok=False)
        return
    binds = evidence.report_data == bootstrap_report_data(ca_pubkey, k256_pubkey)
    got = "binds both keys" if binds else f"report_data {short(evidence.report_data.hex())}"
    run.transcript.record(subject, got, expected, binds)


async def _check_by_verifier(run: RunbookRun) -> None:
    """Check that a verifier accepts the attestation of the bootstrap, and rejects it if one bit is changed."""
    verifier, bootstrap = run.target.verifier, run.bootstrap
    if verifier is None or bootstrap is None:
        missing = (
            "the target names no verifier (services.verifier)" if verifier is None else "kms-src did not bootstrap"
        )
        run.transcript.record("the verifier on the attestation of the bootstrap", missing, IS_VALID.text, None)
        return
    try:
        evidence = decode(bytes.fromhex(bootstrap.field("attestation")))
    except (AttestError, ValueError, TypeError):
        return  # the previous step has recorded the error
    for about, name, attestation, expected in (
        ("the attestation of the bootstrap", "verify-bootstrap", evidence, IS_VALID),
        ("it with one bit of the quote changed", "verify-altered-bootstrap", altered(evidence), IS_NOT_VALID),
    ):
        document = {"attestation": attestation.encode().hex()}
        await run.post(f"verifier/verify, {about}", f"{verifier}/verify", document, expected, keep=name)
