"""The table of facts about real hardware says what the files say, and holds together without them."""

import pytest

from dstack_emu.attest.attestation import decode
from dstack_emu.attest.eventlog import replay_register
from tests.hardware import APP_KEYS, BOOTS, INTEL_COLLATERAL, INTEL_QUOTE, LEGACY, LITE, boot, facts, facts_of
from tests.recorded import external_path

FILES = (*BOOTS, INTEL_QUOTE, INTEL_COLLATERAL, APP_KEYS)


@pytest.mark.parametrize("name", FILES)
def test_table_says_what_the_file_says(name: str) -> None:
    assert facts_of(name, external_path(name).read_bytes()) == facts(name)


@pytest.mark.parametrize("name", BOOTS)
def test_log_of_the_table_replays_to_the_registers_of_the_table(name: str) -> None:
    known = boot(name)
    # A certificate's log has of RTMR0 to 2 only three events; of the legacy boot the table leaves RTMR3's events out.
    replayed = {LITE: (3,), LEGACY: (0, 1, 2)}.get(name, (0, 1, 2, 3))
    for imr in replayed:
        assert replay_register(known.events, imr) == known.report.rtmrs[imr]


@pytest.mark.parametrize("name", BOOTS)
def test_evidence_made_of_the_table_is_the_boots(name: str) -> None:
    known = boot(name)
    evidence = decode(known.attestation().encode())
    assert evidence == known.attestation()
    assert evidence.event_log == known.events
