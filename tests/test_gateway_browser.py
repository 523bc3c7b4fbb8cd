"""Apps behind a gateway in a real Chromium, which trusts the gateway's CA after the documented command, and not before.

It runs if DSTACK_EMU_BROWSER is set (`make browser`): starting a browser takes seconds.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import chromium, program
from tests.documents import document
from tests.running import RunningStack, running_stack

pytestmark = [
    pytest.mark.skipif("DSTACK_EMU_BROWSER" not in os.environ, reason="DSTACK_EMU_BROWSER is not set: `make browser`"),
]

DOCUMENTED_CA = "/tmp/emu/gateway/data/gateway-ca.crt"


@pytest.fixture(scope="module")
def stack() -> Iterator[RunningStack]:
    """A stack with a gateway."""
    with running_stack("--gateway") as running:
        yield running


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The home of a user whose browser has a database of certificates, as it makes it at its first start."""
    if program() is None or shutil.which("certutil") is None:
        pytest.fail("DSTACK_EMU_BROWSER is set: install Debian's chromium-headless-shell and libnss3-tools")
    database = tmp_path / ".pki/nssdb"
    database.mkdir(parents=True)
    subprocess.run(["certutil", "-d", f"sql:{database}", "-N", "--empty-password"], check=True, timeout=30)
    return tmp_path


def trust(home: Path, ca: str) -> None:
    """Run the command of the documents by which a user trusts the CA."""
    (command,) = re.findall(r"^certutil .* -A .*$", document("docs/howto/gateway.md"), re.MULTILINE)
    assert DOCUMENTED_CA in command
    environment = {**os.environ, "HOME": str(home)}
    shell = ["bash", "-c", command.replace(DOCUMENTED_CA, ca)]
    subprocess.run(shell, check=True, timeout=30, env=environment)


def test_app_url_opens_once_the_ca_is_trusted_and_not_before(stack: RunningStack, home: Path, tmp_path: Path) -> None:
    gateway = stack.description["gateway"]
    profiles = (tmp_path / "before", tmp_path / "after")
    for profile in profiles:
        profile.mkdir()
    with chromium(profiles[0], home) as browser:
        failed = browser.tab().send("Page.navigate", url=gateway["app_url"])
        assert failed["errorText"] == "net::ERR_CERT_AUTHORITY_INVALID"
    trust(home, gateway["ca"])
    with chromium(profiles[1], home) as browser:
        tab = browser.tab()
        tab.open(gateway["app_url"])
        tab.see(stack.description["app"]["instance_id"])
        assert tab.run("location.protocol") == "https:"
        assert tab.run("isSecureContext") is True
        assert tab.complaints == []
