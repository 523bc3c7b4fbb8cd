"""The chain as a program in Rust uses it, with alloy, the library of cast and forge.

It runs if DSTACK_EMU_RUST is set (`make rust`), which names the program that cargo has built: a build takes minutes.
"""

import json
import os
import subprocess
import tempfile

import pytest

from tests.processes import start
from tests.repository import ROOT

PROGRAM = os.environ.get("DSTACK_EMU_RUST")
STEPS = [
    "deployed",
    "subscribed to blocks; the hash of a header is that of its RLP",
    "sent, waited for the receipt, and was told of the log",
    "deployed an app through the factory",
    "filtered logs",
    "decoded a custom error",
    "read earlier states, fees, transactions, receipts and storage",
    "used anvil's methods",
]

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="DSTACK_EMU_RUST is not set: `make rust`")


@pytest.mark.parametrize("revision", ["0.5.11", "next"])
def test_program_deploys_calls_waits_subscribes_filters_and_decodes_errors(revision: str) -> None:
    with tempfile.TemporaryFile("w+") as log:
        chain = start("chain", "--no-contracts", "--listen", "127.0.0.1:0", "--json", stderr=log)
        try:
            described = json.loads(chain.stdout.readline())
            keys = [account["private_key"] for account in described["accounts"][:2]]
            command = [str(PROGRAM), described["url"], str(ROOT / "dstack_emu/chain/contracts" / revision), *keys]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        finally:
            chain.end()
    assert (done.returncode, done.stdout.splitlines()) == (0, STEPS), done.stderr
