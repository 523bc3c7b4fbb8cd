"""The logs of a stack by service, kept in memory while it runs.

The services of a process share their loggers. The service of a record is found by the context in which it is logged: a
server that is started inside `ServiceLogs.of` handles every request in a copy of that context. The levels of loggers
are not changed, and all other handlers receive the records, too.
"""

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

from dstack_emu.transport.events import logger_name

KEPT: Final = 10_000
"""The number of records that are kept of each service; older ones are dropped."""

_current: "ContextVar[tuple[ServiceLogs, str] | None]" = ContextVar("service of a stack", default=None)


class ServiceLogs(logging.Handler):
    """The log records of one stack. Attach it, and detach it at the end."""

    def __init__(self) -> None:
        super().__init__()
        self._records: dict[str, deque[logging.LogRecord]] = {}

    def attach(self) -> None:
        """Receive the records of every logger."""
        logging.getLogger().addHandler(self)

    def detach(self) -> None:
        """Receive no further records; keep those received so far."""
        logging.getLogger().removeHandler(self)

    @contextmanager
    def of(self, service: str) -> Iterator[None]:
        """Assign the records of a block, in this context and in copies of it, to a service."""
        token = _current.set((self, service))
        try:
            yield
        finally:
            _current.reset(token)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record, if it is of a service of this stack."""
        current = _current.get()
        if current is not None and current[0] is self:
            self.keep(current[1], record)

    def keep(self, service: str, record: logging.LogRecord) -> None:
        """Keep a record of a service."""
        self._records.setdefault(service, deque(maxlen=KEPT)).append(record)

    def records(self, service: str) -> list[logging.LogRecord]:
        """Return the records of a service so far, oldest first."""
        return list(self._records.get(service, ()))

    def lines(self, service: str, level: int = logging.NOTSET) -> list[str]:
        """Return the records of a level or above as text: level, logger and message, without times."""
        found = (record for record in self.records(service) if record.levelno >= level)
        return [f"{record.levelname} {logger_name(record)}: {record.getMessage()}" for record in found]
