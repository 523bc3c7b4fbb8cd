"""The log of a KMS's RPCs: each refusal with its reason and, at level debug, that a call was answered.

It wraps a table of RPCs, so it is the same for every server. The content of answers is never logged: it may be keys.
The answer to a refused caller is upstream's text; what the log adds about the clock is ours.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final, TypeVar

from dstack_emu.attest.errors import AttestError
from dstack_emu.attest.moment import iso
from dstack_emu.kms_emu.errors import KmsError, UnavailableError
from dstack_emu.transport.events import EventLog
from dstack_emu.transport.pccs_client import Clock
from dstack_emu.transport.service import Rpc, ServiceTable

C = TypeVar("C")
Who = Callable[[C], Mapping[str, object]]

_TOO_EARLY: Final = re.compile("issue date is in the future|CertNotValidYet|is not yet valid")
"""What dcap-qvl, and dstack of a client certificate, say at a time before a date."""


def nobody(_context: object) -> Mapping[str, object]:
    """Return the fields of a caller that is not identified: none."""
    return {}


def journaled(table: ServiceTable[C], log: EventLog, clock: Clock, who: Who[C] = nobody) -> ServiceTable[C]:
    """Return the same table with a log of refusals and answers.

    `clock` is that by which evidence is verified; `who` returns the fields that identify a caller.
    """
    return ServiceTable(table.prefix, {name: _journaled(rpc, log, clock, who) for name, rpc in table.rpcs.items()})


def _journaled(rpc: Rpc[C, Any, Any], log: EventLog, clock: Clock, who: Who[C]) -> Rpc[C, Any, Any]:
    async def handle(caller: C, request: Any) -> Any:
        try:
            answer = await rpc.handler(caller, request)
        except (KmsError, AttestError) as error:
            log_refusal(log, error, clock, rpc=rpc.name, **who(caller))
            raise
        if log.is_debug():
            log.debug("answered", rpc=rpc.name, **who(caller))
        return answer

    return replace(rpc, handler=handle)


def log_refusal(log: EventLog, error: Exception, clock: Clock, **fields: object) -> None:
    """Log a refusal: as a warning if webhook, PCCS, agent or source KMS gave no usable answer, otherwise as info."""
    write = log.warning if isinstance(error, UnavailableError) else log.info
    reason = str(error)
    kind = type(error).__name__.removesuffix("Error")
    write("refused", **fields, kind=kind, reason=reason, **early_clock(reason, clock))


def early_clock(reason: str, clock: Clock) -> dict[str, str]:
    """Return the field that names the clock, if a date was still to come when something was refused; else none."""
    if not _TOO_EARLY.search(reason):
        return {}
    return {"hint": f"the clock of this KMS is at {iso(clock())}, before that date"}
