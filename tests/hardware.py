"""Facts about real TDX hardware: registers, digests, hashes and sizes of files that are not part of this repository.

`tests/vectors/hardware.json` holds them by file name; `facts_of` says how they follow from a file. They carry no
signature of Intel's: evidence that is built of them here is quoted by an emulated platform.
"""

import functools
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final

from cryptography import x509

from dstack_emu.attest.attestation import Attestation, decode
from dstack_emu.attest.eventlog import TdxEvent, log_from_json, log_to_json
from dstack_emu.attest.pck import PckExtension, pck_extension_of
from dstack_emu.attest.quote import TD10_FIELDS, Quote, TdReport
from dstack_emu.simulator.intel import Intel
from dstack_emu.simulator.seed import Seed
from tests.recorded import COMMITTED

VERSIONED: Final = "hardware-attestation-v0.scale"
LITE: Final = "tdx-lite-attestation.json"
LITE_GET_QUOTE: Final = "tdx-lite-getquote.json"
LEGACY: Final = "quote-report.json"
INTEL_QUOTE: Final = "intel-tdx-quote.bin"
INTEL_COLLATERAL: Final = "intel-tdx-collateral.json"
APP_KEYS: Final = "appkeys.json"
BOOTS: Final = (VERSIONED, LITE, LITE_GET_QUOTE, LEGACY)
"""Files with the evidence of a whole boot."""

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class HardwareBoot:
    """One boot on real hardware.

    Of a boot event's payload the table has the size and the hash alone, so `events` has them empty, as GetQuote answers
    them; payloads of runtime events and of the ACPI events are whole.
    """

    report: TdReport
    vm_config: str
    events: tuple[TdxEvent, ...]
    payload_hashes: tuple[str, ...]
    """SHA-256 of each event's payload as it was recorded, hex."""

    def attestation(self) -> Attestation:
        """Return evidence of this boot whose quote an emulated platform signs."""
        quote = _platform().quote(self.report)
        runtime = tuple(event.runtime() for event in self.events if event.is_runtime)
        config = json.dumps({"vm_config": self.vm_config})
        return Attestation(quote, self.events, runtime, self.report.report_data, config)

    def get_quote(self) -> Json:
        """Return the same as GetQuote answers it."""
        return {
            "quote": _platform().quote(self.report).hex(),
            "event_log": log_to_json(self.events),
            "report_data": self.report.report_data.hex(),
            "vm_config": self.vm_config,
        }


@functools.cache
def _table() -> Json:
    table: Json = json.loads((COMMITTED / "hardware.json").read_text())
    return table


@functools.cache
def _platform() -> Any:
    return Intel(Seed.of("hardware")).platform("stands in for the hardware")


def facts(name: str) -> Json:
    """Return what the table has of a file."""
    found: Json = _table()[name]
    return found


def boot(name: str) -> HardwareBoot:
    """Return the boot whose evidence a file is."""
    known = facts(name)
    rows = known["event_log"]
    return HardwareBoot(
        report=TdReport(**{field: bytes.fromhex(value) for field, value in known["td_report"].items()}),
        vm_config=json.dumps(known["vm_config"], separators=(",", ":")),
        events=tuple(
            TdxEvent(
                row["imr"],
                row["event_type"],
                bytes.fromhex(row["digest"]),
                row["event"],
                bytes.fromhex(row.get("payload", "")),
            )
            for row in rows
        ),
        payload_hashes=tuple(row["payload_sha256"] for row in rows),
    )


def intel_pck() -> PckExtension:
    """Return the SGX extension of the PCK certificate in Intel's sample quote."""
    pck: Json = facts(INTEL_QUOTE)["pck"]
    values: Json = {name: bytes.fromhex(value) if isinstance(value, str) else value for name, value in pck.items()}
    return PckExtension(**values)


def facts_of(name: str, data: bytes) -> Json:
    """Derive a file's row of the table."""
    known: Json = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    if name == VERSIONED:
        known |= _of_attestation(decode(data))
    elif name == LITE:
        known |= _of_attestation(decode(bytes.fromhex(json.loads(data)["attestation"])))
    elif name in (LITE_GET_QUOTE, LEGACY):
        known |= _of_answer(json.loads(data))
        if name == LEGACY:  # RTMR3's rows have texts of the machine's owner
            known["event_log"] = [row for row in known["event_log"] if row["imr"] < 3]
    elif name == INTEL_QUOTE:
        known |= _of_quote(data) | {"pck": _of_pck(Quote.parse(data))}
    return known


def _of_attestation(attestation: Attestation) -> Json:
    config = json.loads(attestation.config)
    vm_config = json.loads(config["vm_config"]) if "vm_config" in config else config
    return _of_quote(attestation.quote) | {"vm_config": vm_config, "event_log": _of_log(attestation.event_log)}


def _of_answer(answer: Json) -> Json:
    log = log_from_json(answer["event_log"])
    return _of_quote(bytes.fromhex(answer["quote"])) | {
        "vm_config": json.loads(answer["vm_config"]),
        "event_log": _of_log(log),
    }


def _of_quote(quote: bytes) -> Json:
    report = Quote.parse(quote).report
    return {"quote_size": len(quote), "td_report": {name: getattr(report, name).hex() for name, _ in TD10_FIELDS}}


def _of_log(log: Iterable[TdxEvent]) -> list[Json]:
    return [_of_event(event) for event in log]


def _of_event(event: TdxEvent) -> Json:
    row: Json = {
        "imr": event.imr,
        "event_type": event.event_type,
        "digest": event.digest.hex(),
        "event": event.event,
        "payload_sha256": hashlib.sha256(event.event_payload).hexdigest(),
    }
    if event.is_runtime or event.is_acpi_data:
        row["payload"] = event.event_payload.hex()
    return row


def _of_pck(quote: Quote) -> Json:
    leaf = x509.load_pem_x509_certificates(quote.signature.pck_chain)[0]
    values = asdict(pck_extension_of(leaf)).items()
    return {name: value.hex() if isinstance(value, bytes) else value for name, value in values}
