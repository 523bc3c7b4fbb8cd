"""A webhook of a user: a few lines decide, and a KMS that is configured with its URL follows the decision."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import foreign
from tests.foreign import Guest
from tests.running import RunningStack, running_kms

WEBHOOK = """
import socket, sys
from aiohttp import web

async def decide(request):
    boot_info, allowed = await request.json(), open(sys.argv[1]).read()
    reason = "" if boot_info["mrAggregated"] in allowed else f"not on my list for {request.match_info['who']}"
    return web.json_response({"isAllowed": not reason, "reason": reason, "gatewayAppId": "mine"})

app = web.Application()
app.add_routes([web.post("/bootAuth/{who}", decide)])
sock = socket.create_server(("127.0.0.1", 0))
print(sock.getsockname()[1], flush=True)
web.run_app(app, sock=sock, print=None)
"""

KMS = """
[rpc]
address = "127.0.0.1"
port = 0
[rpc.tls]
key = "{certs}/rpc.key"
certs = "{certs}/rpc.crt"
[rpc.tls.mutual]
ca_certs = "{certs}/tmp-ca.crt"
[core]
cert_dir = "{certs}"
[core.auth_api.webhook]
url = "{webhook}"
[core.onboard]
address = "127.0.0.1"
port = 0
[core.image]
verify = false
[core.attestation]
insecure_allow_external_trust_anchors = true
[core.attestation.urls]
pccs = "{pccs}"
[core.attestation.root_ca]
tdx = "{root_ca}"
"""


@pytest.fixture
def allowed(tmp_path: Path) -> Path:
    """The list that the webhook reads for every question: nobody is on it."""
    path = tmp_path / "allowed.txt"
    path.write_text("")
    return path


@pytest.fixture
def webhook(allowed: Path) -> Iterator[str]:
    """A webhook of a user, in its own process."""
    command = [sys.executable, "-c", WEBHOOK, str(allowed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.terminate()


def test_flow_obeys_a_webhook_of_ones_own(
    ready_stack: RunningStack, webhook: str, allowed: Path, tmp_path: Path
) -> None:
    config, root_ca = tmp_path / "kms.toml", ready_stack.description["root_ca"]
    pccs = ready_stack.services["pccs"]
    config.write_text(KMS.format(certs=tmp_path / "certs", webhook=webhook, pccs=pccs, root_ca=root_ca))
    kms = str(ready_stack.description["kms"]["src"]["mr_aggregated"])
    app = str(foreign.ask_agent(ready_stack.services["app"], "Info")["mr_aggregated"])
    with running_kms(config, ready_stack.services["agent-src"]) as url:
        with foreign.kms(url) as connection:
            refusal = connection.call("Bootstrap", domain="127.0.0.1").error
            assert refusal == "KMS is not allowed to bootstrap: boot denied: not on my list for kms"
            allowed.write_text(kms)
            assert set(connection.call("Bootstrap", domain="127.0.0.1").value) >= {"ca_pubkey", "k256_pubkey"}
            assert connection.get("/finish").body == "OK"
        port = re.sub("^http:", "https:", url)
        guest = Guest.of(port, ready_stack.services["app"])
        identity = guest.identity()
        assert guest.get_app_key(identity).error == "App not allowed: Boot denied: not on my list for app"
        allowed.write_text(f"{kms} {app}")
        keys = guest.get_app_key(identity).value
        assert (len(keys["k256_key"]), keys["gateway_app_id"]) == (64, "mine")
        allowed.write_text(app)
        refusal = guest.get_app_key(identity).error
        assert refusal == "KMS self authorization failed: KMS is not allowed: not on my list for kms"
