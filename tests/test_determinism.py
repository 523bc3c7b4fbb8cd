"""The same seed gives the same bytes in every process, another seed shares none of them."""

import hashlib
import http.client
import json
from pathlib import Path
from urllib.parse import urlsplit

import dcap_qvl
import pytest

from tests import foreign
from tests.foreign import Guest
from tests.running import RunningStack, running_stack

REPORT_DATA = hashlib.sha512(b"determinism").digest()
KEPT = ("root-ca.crt", "root-ca.key", "root-k256.key", "rpc-domain", "rpc.crt", "rpc.key", "tmp-ca.crt", "tmp-ca.key")
SHARED = {"kms-src/rpc-domain", "kms-dst/rpc-domain"}
"""What no seed is in."""

Bytes = dict[str, bytes]


def everything(stack: RunningStack) -> Bytes:
    """Every byte of a stack that somebody could compare, by what it is; addresses are no part of any."""
    state = Path(stack.description["state"])
    found: Bytes = {"root-ca.pem": (state / "root-ca.pem").read_bytes()}
    for side in ("src", "dst"):
        folder = state / f"kms-{side}" / "certs"
        found |= {f"kms-{side}/{name}": (folder / name).read_bytes() for name in KEPT}
        found[f"kms-{side}/attestation info"] = json.dumps(stack.description["kms"][side], sort_keys=True).encode()
    found["bootstrap-info.json"] = (state / "kms-src" / "certs" / "bootstrap-info.json").read_bytes()
    for agent in ("agent-src", "agent-dst", "app"):
        url = stack.services[agent]
        quote = foreign.ask_agent(url, "GetQuote", {"report_data": REPORT_DATA.hex()})
        found[f"{agent}/quote"] = bytes.fromhex(quote["quote"])
        found[f"{agent}/event log"] = quote["event_log"].encode()
        evidence = foreign.ask_agent(url, "Attest", {"report_data": REPORT_DATA.hex()})
        found[f"{agent}/attestation"] = bytes.fromhex(evidence["attestation"])
        found[f"{agent}/info"] = json.dumps(foreign.ask_agent(url, "Info"), sort_keys=True).encode()
        found[f"{agent}/key"] = foreign.ask_agent(url, "GetKey", {"path": "a", "purpose": "b"})["key"].encode()
        found |= {f"{agent}{path}": body for path, body in collateral(stack, bytes.fromhex(quote["quote"])).items()}
    keys = Guest.of(stack.services["kms-src"], stack.services["app"]).get_app_key().value
    found |= {f"app/{name}": str(keys[name]).encode() for name in ("disk_crypt_key", "env_crypt_key", "k256_key")}
    found["app/k256_signature"] = str(keys["k256_signature"]).encode()
    return found


def collateral(stack: RunningStack, quote: bytes) -> Bytes:
    """What the PCCS says for a quote, by path."""
    fmspc = dcap_qvl.parse_quote(quote).fmspc()
    paths = {
        "/pckcrl": "/sgx/certification/v4/pckcrl?ca=platform&encoding=der",
        "/tcb": f"/tdx/certification/v4/tcb?fmspc={fmspc}",
        "/qe/identity": "/tdx/certification/v4/qe/identity",
        "/rootcacrl": "/sgx/certification/v4/rootcacrl",
    }
    connection = http.client.HTTPConnection(urlsplit(stack.services["pccs"]).netloc, timeout=10)
    found = {}
    try:
        for name, path in paths.items():
            connection.request("GET", path)
            answer = connection.getresponse()
            assert answer.status == 200
            found[name] = answer.read()
    finally:
        connection.close()
    return found


@pytest.fixture(scope="module")
def stacks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bytes]:
    """Stacks one after the other: two of one seed, one of another, and one that goes on where the first ended."""
    folder = tmp_path_factory.mktemp("stacks")
    runs = {"first": ("same", "a"), "second": ("same", "another"), "third": ("other", "c"), "resumed": ("same", "a")}
    found = {}
    for name, (seed, state) in runs.items():
        with running_stack("--seed", seed, "--state", str(folder / state)) as stack:
            found[name] = everything(stack)
    return found


@pytest.mark.parametrize("other", ["second", "resumed"])
def test_same_seed_gives_the_same_bytes(stacks: dict[str, Bytes], other: str) -> None:
    first, second = stacks["first"], stacks[other]
    assert list(first) == list(second)
    assert {name for name in first if first[name] != second[name]} == set()


def test_another_seed_shares_no_bytes(stacks: dict[str, Bytes]) -> None:
    first, third = stacks["first"], stacks["third"]
    assert list(first) == list(third)
    assert {name for name in first if first[name] == third[name]} == SHARED
