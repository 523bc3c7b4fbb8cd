"""What a KMS of release 0.6 has for operators: credentials for its onboard phase, and the hand-over of root keys on the
admin listener. Beside each, what a KMS of 0.5 makes of the same configuration."""

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests import foreign
from tests.commands import serving
from tests.foreign import Authority
from tests.kms_process import Kms, World, ends, running, variables

TOKEN = "the-operators-token"
WRONG = "the-operators-tokem"
PASSWORD = "myPassword"
USERS = "myName:$2y$05$c4WoMPo3SXsafkva.HHa6uXQZWr7oboPiC2bT/r7q1BB8I2s0BRqC\n"
"""An htpasswd file, from Apache's documentation."""
DOMAIN = "kms.example.test"
RELEASE = ("--release", "0.6")
ROOT_KEYS = ("root-ca.key", "root-k256.key")
DISABLED = "public KMS key handover is disabled; use the admin listener"


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """One agent with its PCCS."""
    with serving("agent", *RELEASE) as description:
        yield World.of(description)


def says_nothing_of(secret: str, kms: Kms) -> bool:
    return not [line for line in kms.log() if secret in line]


# ---- the onboard phase


ROUTES = ("/", "/health", "/finish", "/nothing", "/prpc/Onboard.GetAttestationInfo?json", "/prpc/Onboard.Nothing")


@pytest.fixture(scope="module")
def guarded(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kms]:
    """A fresh KMS that demands a token or a user."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "users").write_text(USERS)
    keys = {"core.onboard.auth_token": TOKEN, "core.onboard.htpasswd_file": str(folder / "users")}
    with running(folder, world, *RELEASE, **variables(keys)) as kms:
        yield kms


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("-H", f"Authorization: Bearer {WRONG}"),
        ("-H", "X-Onboard-Token;"),
        ("-u", f"myName:{TOKEN}x"),
        ("-X", "PUT"),
    ],
)
def test_every_route_asks_for_a_credential(guarded: Kms, route: str, arguments: tuple[str, ...]) -> None:
    status, answer = guarded.curl(route, "-D", "-", *arguments)
    assert status == 401
    head, _, body = answer.replace("\r", "").partition("\n\n")
    assert 'WWW-Authenticate: Basic realm="dstack-kms onboard"' in head
    assert body == ""
    assert guarded.curl("/health", "-H", f"Authorization: Bearer {TOKEN}") == (200, "OK")


@pytest.mark.parametrize(
    "arguments",
    [
        ("-H", f"Authorization: Bearer {TOKEN}"),
        ("-H", f"X-Onboard-Token: {TOKEN}"),
        ("-u", f"anyone:{TOKEN}"),
        ("-u", f"{TOKEN}:"),
        ("-u", f"myName:{PASSWORD}"),
    ],
)
def test_credential_in_a_header_admits(guarded: Kms, arguments: tuple[str, ...]) -> None:
    assert guarded.curl("/health", *arguments) == (200, "OK")
    status, answer = guarded.curl("/prpc/Onboard.GetAttestationInfo?json", "-d", "{}", *arguments)
    assert (status, len(json.loads(answer)["mr_aggregated"])) == (200, 64)
    assert guarded.curl("/nothing", *arguments)[0] == 404


def test_token_in_the_address_admits_a_get_and_nothing_else(guarded: Kms) -> None:
    assert "A fresh dstack KMS" in guarded.curl(f"/?token={TOKEN}")[1]
    path = "/prpc/Onboard.GetAttestationInfo"
    assert guarded.curl(f"{path}?json&token={TOKEN}")[0] == 200
    assert guarded.curl(f"{path}?tok%65n={TOKEN.replace('-', '%2D')}")[0] == 200
    assert guarded.curl(f"{path}?token={WRONG}&token={TOKEN}")[0] == 200
    for arguments in (("-d", "{}"), ("-I",), ("-X", "PUT")):
        assert guarded.curl(f"{path}?json&token={TOKEN}", *arguments)[0] == 401
    assert guarded.curl(f"{path}?token={WRONG}")[0] == 401
    # What is wrong with an Authorization header is not made good by the address.
    assert guarded.curl(f"{path}?token={TOKEN}", "-H", f"Authorization: Bearer {WRONG}")[0] == 401


def test_refusals_are_logged_and_secrets_are_not(guarded: Kms) -> None:
    assert guarded.curl(f"/finish?token={WRONG}")[0] == 401
    assert [line for line in guarded.log() if "refused listener=onboard" in line and "path=/finish" in line]
    for secret in (TOKEN, WRONG, PASSWORD, USERS[7:-1]):
        assert says_nothing_of(secret, guarded)


def test_token_is_in_no_refusal_and_no_log_of_any_detail(world: World, tmp_path: Path) -> None:
    """Requests that cannot be read, and everything that is logged at the highest level."""
    secret = "s3cret-of-the-source"
    with running(tmp_path, world, *RELEASE, "-vv", DSTACK_KMS_ONBOARD_TOKEN=TOKEN) as kms:
        header = ("-H", f"X-Onboard-Token: {TOKEN}")
        for body in (
            f'{{"source_token":["{secret}"]}}',
            f'{{"source_token":{{"{secret}":1}}}}',
            f'{{"source_token":"{secret}"',
            f'{{"source_token":"{secret}","{secret}":1,"domain":""}}',
            f'["", "", "{secret}", 1]',
            f'"{secret}"',
        ):
            status, answer = kms.curl("/prpc/Onboard.Onboard?json", "-d", body, *header)
            assert (status, secret in answer) == (400, False), answer
        for path in (f"/?token={TOKEN}", f"/nothing?token={TOKEN}", f"/prpc/Onboard.Onboard?token={TOKEN}&domain=%"):
            assert TOKEN not in kms.curl(path)[1]
        for each in (secret, TOKEN):
            assert says_nothing_of(each, kms)


def test_token_of_the_environment_admits_and_goes_behind_the_files(world: World, tmp_path: Path) -> None:
    with running(tmp_path, world, *RELEASE, DSTACK_KMS_ONBOARD_TOKEN=f" {TOKEN} ") as kms:
        assert kms.curl("/health")[0] == 401
        assert kms.curl("/health", "-H", f"X-Onboard-Token: {TOKEN}") == (200, "OK")
    keys = variables({"core.onboard.auth_token": "another"})
    with running(tmp_path, world, *RELEASE, DSTACK_KMS_ONBOARD_TOKEN=TOKEN, **keys) as kms:
        assert kms.curl("/health", "-H", f"X-Onboard-Token: {TOKEN}")[0] == 401
        assert kms.curl("/health", "-H", "X-Onboard-Token: another") == (200, "OK")


def test_guarded_kms_is_set_up_with_the_token_and_then_open(world: World, tmp_path: Path) -> None:
    with running(tmp_path, world, *RELEASE, DSTACK_KMS_ONBOARD_TOKEN=TOKEN) as kms:
        body = json.dumps({"domain": DOMAIN})
        assert kms.curl("/prpc/Onboard.Bootstrap?json", "-d", body)[0] == 401
        assert not any((kms.certs / name).exists() for name in ROOT_KEYS)
        header = ("-H", f"Authorization: Bearer {TOKEN}")
        assert kms.curl("/prpc/Onboard.Bootstrap?json", "-d", body, *header)[0] == 200
        assert kms.curl("/finish")[0] == 401
        assert kms.curl("/finish", *header) == (200, "OK")
        assert kms.curl("/health", url=kms.runtime_url) == (200, "OK")
        assert kms.rpc("KMS.GetMeta")[0] == 200


def test_kms_without_a_credential_is_open(world: World, tmp_path: Path) -> None:
    with running(tmp_path, world, *RELEASE, DSTACK_KMS_ONBOARD_TOKEN=" ") as kms:
        assert kms.curl("/health") == (200, "OK")
        assert kms.curl("/", "-H", f"Authorization: Bearer {WRONG}")[0] == 200


@pytest.mark.parametrize(
    ("address", "release", "token", "is_said"),
    [
        ("0.0.0.0", "0.6", "", True),
        ("0.0.0.0", "0.6", TOKEN, False),
        ("127.0.0.1", "0.6", "", False),
        ("0.0.0.0", "0.5", "", False),
    ],
)
def test_open_onboard_phase_is_said_if_others_reach_it(
    world: World, tmp_path: Path, address: str, release: str, token: str, is_said: bool
) -> None:
    where = {"listen": f"{address}:0", "DSTACK_KMS_ONBOARD_TOKEN": token}
    with running(tmp_path, world, "--release", release, **where) as kms:
        said = [line for line in kms.log() if 'weakened setting="core.onboard.auth_token is not set"' in line]
    assert bool(said) is is_said


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"core.image.verify": "false"}, "os image verification is disabled"),
        ({"core.enforce_self_authorization": "false"}, "self-authorization is disabled"),
    ],
)
@pytest.mark.parametrize("release", ["0.5", "0.6"])
def test_verification_that_is_switched_off_is_said_at_the_start(
    world: World, tmp_path: Path, release: str, keys: dict[str, str], said: str
) -> None:
    for values, is_said in ((keys, True), (dict.fromkeys(keys, "true"), False)):
        with running(tmp_path, world, "--release", release, **variables(values)) as kms:
            assert bool([line for line in kms.log() if "weakened " in line and said in line]) is is_said


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("core.onboard.auth_token", TOKEN, "core.onboard.auth_token is not known to dstack 0.5"),
        ("core.onboard.htpasswd_file", "users", "core.onboard.htpasswd_file is not known to dstack 0.5"),
        (
            "core.onboard.public_key_handover",
            "false",
            "core.onboard.public_key_handover = false is not known to dstack 0.5",
        ),
    ],
)
def test_setting_that_would_protect_nothing_in_0_5_ends_the_start(
    world: World, tmp_path: Path, key: str, value: str, said: str
) -> None:
    (tmp_path / "users").write_text(USERS)
    keys = variables({key: str(tmp_path / value) if key.endswith("_file") else value})
    status, line = ends(tmp_path, world, "--release", "0.5", **keys)
    assert (status, said in line, TOKEN in line) == (2, True, False)
    with running(tmp_path, world, *RELEASE, **keys) as kms:
        assert kms.curl("/health")[0] == (200 if key.endswith("handover") else 401)


def test_variable_has_no_effect_in_0_5(world: World, tmp_path: Path) -> None:
    with running(tmp_path, world, "--release", "0.5", DSTACK_KMS_ONBOARD_TOKEN=TOKEN) as kms:
        assert kms.curl("/health") == (200, "OK")
        assert 'name="source_token"' not in kms.curl("/")[1]


def test_page_has_a_field_for_the_sources_token(guarded: Kms) -> None:
    assert 'name="source_token" type="password"' in guarded.curl(f"/?token={TOKEN}")[1]


# ---- the admin listener hands over, after upstream's own acceptance case


@pytest.fixture(scope="module")
def identity(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Options of curl for a self-signed client certificate with evidence."""
    folder, key = tmp_path_factory.mktemp("client"), foreign.new_key()
    evidence = foreign.attest(world.agent.removeprefix("unix:"), foreign.spki_of(key))
    made = Authority.invent("a client").issue(key, evidence)
    (folder / "crt").write_bytes(made.certificate.public_bytes(Encoding.PEM))
    (folder / "key").write_bytes(made.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return "--cert", str(folder / "crt"), "--key", str(folder / "key")


def handover(folder: Path) -> dict[str, str]:
    """The settings of a KMS that hands its root keys over on its admin listener alone."""
    return {
        "core.onboard.auto_bootstrap_domain": DOMAIN,
        "core.onboard.public_key_handover": "false",
        "core.admin.enabled": "true",
        "core.admin.port": "0",
        "core.admin.auth_token": TOKEN,
        "core.admin.tls.key": str(folder / "certs" / "rpc.key"),
        "core.admin.tls.certs": str(folder / "certs" / "rpc.crt"),
    }


@pytest.fixture(scope="module")
def source(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kms]:
    """Such a KMS, in its runtime phase."""
    folder = tmp_path_factory.mktemp("source")
    with running(folder, world, *RELEASE, **variables(handover(folder))) as kms:
        assert kms.description["admin_url"].startswith("https://")
        yield kms


BEARER = ("-H", f"Authorization: Bearer {TOKEN}")


def call(kms: Kms, method: str, *arguments: str, url: str = "") -> tuple[int, str]:
    return kms.curl(f"/prpc/{method}?json", "-d", "{}", *arguments, url=url or kms.description["admin_url"])


def refused(text: str) -> tuple[int, str]:
    return 400, json.dumps({"error": text}, indent=2)


def test_root_keys_take_token_and_evidence(source: Kms, identity: tuple[str, ...]) -> None:
    status, answer = call(source, "Admin.GetKmsKey", *BEARER, *identity)
    assert status == 200
    (keys,) = json.loads(answer)["keys"]
    assert keys["ca_key"] == (source.certs / "root-ca.key").read_text()
    assert keys["k256_key"] == (source.certs / "root-k256.key").read_bytes().hex()
    assert call(source, "GetKmsKey", *BEARER, *identity) == (200, answer)
    assert call(source, "Admin.GetKmsKey", *identity) == (401, "")
    assert call(source, "Admin.GetKmsKey", "-H", f"X-Admin-Token: {WRONG}", *identity) == (401, "")
    assert call(source, "Admin.GetKmsKey", *BEARER) == refused("No attestation provided")
    assert call(source, "Admin.ClearImageCache", *BEARER) == (200, "null")
    assert says_nothing_of(TOKEN, source)
    assert says_nothing_of(keys["k256_key"], source)


def test_main_listener_refuses_the_hand_over_and_nothing_else(source: Kms, identity: tuple[str, ...]) -> None:
    for more in (identity, (), BEARER):
        assert call(source, "KMS.GetKmsKey", *more, url=source.runtime_url) == refused(DISABLED)
    assert call(source, "KMS.GetAppKey", *identity, url=source.runtime_url)[0] == 200
    assert call(source, "KMS.GetTempCaCert", url=source.runtime_url)[0] == 200


def test_main_listener_hands_over_by_default(world: World, tmp_path: Path, identity: tuple[str, ...]) -> None:
    keys = variables({"core.onboard.auto_bootstrap_domain": DOMAIN})
    with running(tmp_path, world, *RELEASE, **keys) as kms:
        assert call(kms, "KMS.GetKmsKey", *identity, url=kms.runtime_url)[0] == 200


def onboard(kms: Kms, url: str, **more: str) -> tuple[int, dict[str, str]]:
    status, answer = kms.rpc("Onboard.Onboard", {"source_url": url, "domain": DOMAIN, **more})
    return status, answer


def test_fresh_kms_takes_the_keys_over_by_the_admin_listener(world: World, source: Kms, tmp_path: Path) -> None:
    admin = source.description["admin_url"]
    with running(tmp_path, world, *RELEASE) as kms:
        for url, more, said in (
            (source.runtime_url, {}, DISABLED),
            (source.runtime_url, {"source_token": TOKEN}, DISABLED),
            (admin, {}, "Request failed with status=401 Unauthorized, error="),
            (f"{admin}/prpc", {"source_token": WRONG}, "Request failed with status=401 Unauthorized, error="),
            (admin, {"source_token": f"{TOKEN}\r\nX-More: 1"}, "source_token has a control character"),
        ):
            status, answer = onboard(kms, url, **more)
            assert (status, answer["error"].startswith("Failed to onboard: ")) == (400, True)
            assert said in answer["error"]
            assert TOKEN not in answer["error"]
            assert WRONG not in answer["error"]
            assert not any((kms.certs / name).exists() for name in ROOT_KEYS)
        status, answer = onboard(kms, admin, source_token=TOKEN)
        assert status == 200, answer
        assert answer["k256_pubkey"] == source.rpc("KMS.GetMeta")[1]["k256_pubkey"]
        for name in ROOT_KEYS:
            assert (kms.certs / name).read_bytes() == (source.certs / name).read_bytes()
        for each in (kms, source):
            assert says_nothing_of(TOKEN, each)
            assert says_nothing_of(WRONG, each)


@contextmanager
def denying_webhook() -> Iterator[tuple[str, list[dict[str, object]]]]:
    """Deny whatever is asked; yield its URL and the requests."""
    asked: list[dict[str, object]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            body = b'{"isAllowed":false,"reason":"not this one","gatewayAppId":""}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


def test_source_that_the_webhook_denies_gives_no_keys(world: World, source: Kms, tmp_path: Path) -> None:
    with denying_webhook() as (url, asked):
        keys = {"core.auth_api.type": "webhook", "core.auth_api.webhook.url": url}
        with running(tmp_path, world, *RELEASE, **variables(keys)) as kms:
            status, answer = onboard(kms, source.description["admin_url"], source_token=TOKEN)
            said = "Failed to onboard: Source KMS is not allowed for onboarding: boot denied: not this one"
            assert (status, answer) == (400, {"error": said})
            assert [request["osImageHash"] for request in asked] == [world.os_image_hash]
            assert not any((kms.certs / name).exists() for name in ROOT_KEYS)
    with running(tmp_path, world, *RELEASE) as kms:  # its webhook allows everyone
        assert onboard(kms, source.description["admin_url"], source_token=TOKEN)[0] == 200


def test_source_without_evidence_gives_no_keys(world: World, source: Kms, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "fresh").mkdir()
    keys = {**handover(tmp_path / "source"), "core.attest_rpc_cert": "false"}
    with (
        running(tmp_path / "source", world, *RELEASE, **variables(keys)) as kms,
        running(tmp_path / "fresh", world, *RELEASE) as fresh,
    ):
        status, answer = onboard(fresh, kms.description["admin_url"], source_token=TOKEN)
        assert status == 400
        assert answer["error"].endswith("Source KMS certificate does not contain attestation")
        assert not any((fresh.certs / name).exists() for name in ROOT_KEYS)
        assert onboard(fresh, source.description["admin_url"], source_token=TOKEN)[0] == 200


def test_kms_of_0_5_does_not_send_the_token(world: World, source: Kms, tmp_path: Path) -> None:
    with running(tmp_path, world, "--release", "0.5") as kms:
        status, answer = onboard(kms, source.description["admin_url"], source_token=TOKEN)
        assert status == 400
        assert "Request failed with status=401 Unauthorized" in answer["error"]
    with running(tmp_path, world, *RELEASE) as kms:
        assert onboard(kms, source.description["admin_url"], source_token=TOKEN)[0] == 200


def test_admin_listener_of_0_5_hands_nothing_over(world: World, tmp_path: Path, identity: tuple[str, ...]) -> None:
    keys = {key: value for key, value in handover(tmp_path).items() if "handover" not in key}
    with running(tmp_path, world, "--release", "0.5", **variables(keys)) as kms:
        refusal = refused("Service not found: GetKmsKey")
        assert call(kms, "Admin.GetKmsKey", *BEARER, *identity) == refusal
        assert call(kms, "Admin.ClearImageCache", *BEARER) == (200, "null")
        assert call(kms, "Admin.ClearImageCache") == (401, "")


def test_plain_admin_listener_hands_nothing_over(world: World, tmp_path: Path) -> None:
    (tmp_path / "users").write_text(USERS)
    keys = {key: value for key, value in handover(tmp_path).items() if ".tls." not in key and "token" not in key}
    keys["core.admin.htpasswd_file"] = str(tmp_path / "users")
    with running(tmp_path, world, *RELEASE, **variables(keys)) as kms:
        assert kms.description["admin_url"].startswith("http://")
        user = ("-u", f"myName:{PASSWORD}")
        assert call(kms, "Admin.GetKmsKey", *user) == refused("No attestation provided")
        assert call(kms, "Admin.ClearImageCache", *user) == (200, "null")
        assert call(kms, "Admin.ClearImageCache", "-u", "myName:mypassword") == (401, "")
        assert says_nothing_of(PASSWORD, kms)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"core.admin.auth_token": ""}, "admin API is enabled but neither auth_token nor htpasswd_file is configured"),
        ({"core.admin.htpasswd_file": "/absent"}, "core.admin.htpasswd_file: failed to read htpasswd file /absent"),
        ({"core.admin.tls.key": "/absent"}, "core.admin.tls: cannot load "),
    ],
)
def test_admin_listener_that_cannot_be_ends_the_start(
    world: World, tmp_path: Path, keys: dict[str, str], said: str
) -> None:
    status, line = ends(tmp_path, world, *RELEASE, **variables({**handover(tmp_path), **keys}))
    assert (status, said in line, TOKEN in line) == (2, True, False), line
    with running(tmp_path, world, *RELEASE, **variables(handover(tmp_path))) as kms:
        assert call(kms, "Admin.ClearImageCache", *BEARER) == (200, "null")


def test_admin_certificate_without_its_key_ends_the_start(world: World, tmp_path: Path) -> None:
    keys = {key: value for key, value in handover(tmp_path).items() if key != "core.admin.tls.key"}
    status, line = ends(tmp_path, world, *RELEASE, **variables(keys))
    assert (status, "core.admin.tls has no key" in line) == (2, True), line
    with running(tmp_path, world, *RELEASE, **variables(handover(tmp_path))) as kms:
        assert kms.description["admin_url"].startswith("https://")


def test_token_hash_of_0_5_has_no_effect_and_is_said(world: World, tmp_path: Path) -> None:
    keys = {"core.admin_token_hash": "ab" * 32, "core.onboard.auto_bootstrap_domain": DOMAIN}
    with running(tmp_path, world, *RELEASE, **variables(keys)) as kms:
        assert kms.rpc("KMS.ClearImageCache") == (404, {"error": "Service not found: ClearImageCache"})
        assert [line for line in kms.log() if "no effect setting=core.admin_token_hash" in line]


@pytest.mark.parametrize(("release", "is_said"), [("0.5", False), ("0.6", True)])
def test_pccs_by_its_old_key_is_used_and_said(world: World, tmp_path: Path, release: str, is_said: bool) -> None:
    keys = {"core.pccs_url": world.pccs, "core.attestation.urls.pccs": "", "core.onboard.auto_bootstrap_domain": DOMAIN}
    with running(tmp_path, world, "--release", release, **variables(keys)) as kms:
        assert kms.rpc("KMS.GetTempCaCert")[0] == 200
        assert bool([line for line in kms.log() if "old key setting=core.pccs_url" in line]) is is_said


def test_certificate_is_optional_in_0_6_whatever_mutual_says(
    world: World, tmp_path: Path, identity: tuple[str, ...]
) -> None:
    keys = variables({"rpc.tls.mutual.mandatory": "true", "core.onboard.auto_bootstrap_domain": DOMAIN})
    for release, shown, answers in (
        ("0.6", (), True),
        ("0.6", identity, True),
        ("0.5", (), False),
    ):
        with running(tmp_path, world, "--release", release, **keys) as kms:
            assert (call(kms, "KMS.GetMeta", *shown, url=kms.runtime_url)[0] == 200) is answers
            said = [line for line in kms.log() if 'no effect setting="rpc.tls.mutual.mandatory = true"' in line]
            assert bool(said) is (release == "0.6")


# ---- openssl sees what a client may show


def handshake(kms: Kms, url: str) -> str:
    address = url.partition("://")[2]
    command = ["openssl", "s_client", "-connect", address, "-tls1_2"]
    done = subprocess.run(command, input="", capture_output=True, text=True, timeout=30, check=False)
    return done.stdout


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_admin_listener_asks_for_a_certificate_of_any_issuer(source: Kms) -> None:
    shown = handshake(source, source.description["admin_url"])
    assert "No client certificate CA names sent" in shown
    assert DOMAIN in shown
