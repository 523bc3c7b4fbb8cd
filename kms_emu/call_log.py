"""The log of a KMS's RPCs: each refusal with its reason and, at level debug, that a call was answered.

It wraps a table of RPCs, so it is the same for every server. The content of answers is never logged: it may be keys.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from dstack_emu.attest.errors import AttestError
from dstack_emu.kms_emu.errors import KmsError, UnavailableError
from dstack_emu.transport.events import EventLog
from dstack_emu.transport.service import Rpc, ServiceTable

C = TypeVar("C")
Who = Callable[[C], Mapping[str, object]]


def nobody(_context: object) -> Mapping[str, object]:
    """Return the fields of a caller that is not identified: none."""
    return {}


def journaled(table: ServiceTable[C], log: EventLog, who: Who[C] = nobody) -> ServiceTable[C]:
    """Return the same table with a log of refusals and answers; `who` returns the fields that identify a caller."""
    return ServiceTable(table.prefix, {name: _journaled(rpc, log, who) for name, rpc in table.rpcs.items()})


def _journaled(rpc: Rpc[C, Any, Any], log: EventLog, who: Who[C]) -> Rpc[C, Any, Any]:
    async def handle(caller: C, request: Any) -> Any:
        try:
            answer = await rpc.handler(caller, request)
        except (KmsError, AttestError) as error:
            log_refusal(log, error, rpc=rpc.name, **who(caller))
            raise
        if log.is_debug():
            log.debug("answered", rpc=rpc.name, **who(caller))
        return answer

    return replace(rpc, handler=handle)


def log_refusal(log: EventLog, error: Exception, **fields: object) -> None:
    """Log a refusal: as a warning if webhook, PCCS, agent or source KMS gave no usable answer, otherwise as info."""
    write = log.warning if isinstance(error, UnavailableError) else log.info
    write("refused", **fields, kind=type(error).__name__.removesuffix("Error"), reason=str(error))
