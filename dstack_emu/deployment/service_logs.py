"""What the parts of a stack log, by part, kept in memory while it runs.

Parts of one process share their loggers. The context in which a record is logged says which part it is of: a server
that is started inside `ServiceLogs.of` handles every request in a copy of that context. Levels are not touched: what
the loggers let through is kept, and goes on to whoever else listens.
"""

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

from dstack_emu.transport.events import logger_name

KEPT: Final = 10_000
"""Records that are kept of each part; older ones are dropped."""

_where: "ContextVar[tuple[ServiceLogs, str] | None]" = ContextVar("part of a stack", default=None)


class ServiceLogs(logging.Handler):
    """Keeps the records of one stack. Attach it, and detach it at the end."""

    def __init__(self) -> None:
        super().__init__()
        self._records: dict[str, deque[logging.LogRecord]] = {}

    def attach(self) -> None:
        """Listen to every logger."""
        logging.getLogger().addHandler(self)

    def detach(self) -> None:
        """Stop listening. What was kept stays."""
        logging.getLogger().removeHandler(self)

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Let what is logged from here on, in this context and in those that are made in it, be of that part."""
        token = _where.set((self, part))
        try:
            yield
        finally:
            _where.reset(token)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record, if it is of a part of this stack."""
        where = _where.get()
        if where is not None and where[0] is self:
            self._records.setdefault(where[1], deque(maxlen=KEPT)).append(record)

    def records(self, part: str) -> list[logging.LogRecord]:
        """What a part has logged so far, oldest first."""
        return list(self._records.get(part, ()))

    def lines(self, part: str, level: int = logging.NOTSET) -> list[str]:
        """The same as text, from a level on: level, logger and message; no times."""
        found = (record for record in self.records(part) if record.levelno >= level)
        return [f"{record.levelname} {logger_name(record)}: {record.getMessage()}" for record in found]
