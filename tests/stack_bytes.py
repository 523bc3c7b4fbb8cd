"""The bytes of a stack that depend on its seed alone."""

import hashlib
import http.client
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import dcap_qvl

from tests import foreign
from tests.foreign import Guest

REPORT_DATA = hashlib.sha512(b"determinism").digest()
KEPT = ("root-ca.crt", "root-ca.key", "root-k256.key", "rpc-domain", "rpc.crt", "rpc.key", "tmp-ca.crt", "tmp-ca.key")

Bytes = dict[str, bytes]


def everything(description: Mapping[str, Any]) -> Bytes:
    """Every byte of a stack that somebody could compare, by what it is; addresses are no part of any.

    `description` is what `dstack-emu up --json` printed.
    """
    state, services = Path(description["state"]), description["services"]
    found: Bytes = {"root-ca.pem": (state / "root-ca.pem").read_bytes()}
    for side in ("src", "dst"):
        folder = state / f"kms-{side}" / "certs"
        found |= {f"kms-{side}/{name}": (folder / name).read_bytes() for name in KEPT}
        found[f"kms-{side}/attestation info"] = json.dumps(description["kms"][side], sort_keys=True).encode()
    found["bootstrap-info.json"] = (state / "kms-src" / "certs" / "bootstrap-info.json").read_bytes()
    for agent in ("agent-src", "agent-dst", "app"):
        url = services[agent]
        quote = foreign.ask_agent(url, "GetQuote", {"report_data": REPORT_DATA.hex()})
        found[f"{agent}/quote"] = bytes.fromhex(quote["quote"])
        found[f"{agent}/event log"] = quote["event_log"].encode()
        evidence = foreign.ask_agent(url, "Attest", {"report_data": REPORT_DATA.hex()})
        found[f"{agent}/attestation"] = bytes.fromhex(evidence["attestation"])
        found[f"{agent}/info"] = json.dumps(foreign.ask_agent(url, "Info"), sort_keys=True).encode()
        found[f"{agent}/key"] = foreign.ask_agent(url, "GetKey", {"path": "a", "purpose": "b"})["key"].encode()
        found |= {
            f"{agent}{path}": body for path, body in collateral(services["pccs"], bytes.fromhex(quote["quote"])).items()
        }
    keys = Guest.of(services["kms-src"], services["app"]).get_app_key().value
    found |= {f"app/{name}": str(keys[name]).encode() for name in ("disk_crypt_key", "env_crypt_key", "k256_key")}
    found["app/k256_signature"] = str(keys["k256_signature"]).encode()
    return found


def collateral(pccs: str, quote: bytes) -> Bytes:
    """What the PCCS says for a quote, by path."""
    fmspc = dcap_qvl.parse_quote(quote).fmspc()
    paths = {
        "/pckcrl": "/sgx/certification/v4/pckcrl?ca=platform&encoding=der",
        "/tcb": f"/tdx/certification/v4/tcb?fmspc={fmspc}",
        "/qe/identity": "/tdx/certification/v4/qe/identity",
        "/rootcacrl": "/sgx/certification/v4/rootcacrl",
    }
    connection = http.client.HTTPConnection(urlsplit(pccs).netloc, timeout=10)
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
