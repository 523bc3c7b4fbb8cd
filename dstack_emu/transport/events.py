"""Log events: a name with fields, in place of a sentence.

An event is the message of a log record of the standard library; as text it is `name key=value …`. `cli.logs` can also
write its fields as JSON. Not here: where logs go, and which are shown.
"""

import json
import logging
import re
from typing import Final

LOGGERS: Final = "dstack_emu."
"""The prefix of the name of every logger of the project; logs omit it."""

_PLAIN: Final = re.compile(r"[^\s\"=\x00-\x1f\x7f-\x9f]+")


class Event:
    """A name and its fields; as text `name key=value …`, with values in quotes if they are more than one word."""

    __slots__ = ("fields", "name")

    def __init__(self, name: str, **fields: object) -> None:
        self.name, self.fields = name, fields

    def __str__(self) -> str:
        return " ".join((self.name, *(f"{key}={_shown(value)}" for key, value in self.fields.items())))


def _shown(value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def logger_name(record: logging.LogRecord) -> str:
    """Return the name of a record's logger without the prefix."""
    return record.name.removeprefix(LOGGERS)


class EventLog:
    """Logs the events of one part, with fields that identify the part. Callers must not pass secrets."""

    def __init__(self, logger: str, **always: object) -> None:
        self._logger, self._always = logging.getLogger(logger), always

    def debug(self, name: str, **fields: object) -> None:
        """Log an event that happens at every call."""
        self._log(logging.DEBUG, name, fields)

    def info(self, name: str, **fields: object) -> None:
        """Log an event that changes something, or a refusal."""
        self._log(logging.INFO, name, fields)

    def warning(self, name: str, **fields: object) -> None:
        """Log an event that an operator should look at."""
        self._log(logging.WARNING, name, fields)

    def error(self, name: str, **fields: object) -> None:
        """Log the error that ends the part."""
        self._log(logging.ERROR, name, fields)

    def is_debug(self) -> bool:
        """Return whether `debug` logs anything, so that a caller can omit work that only it needs."""
        return self._logger.isEnabledFor(logging.DEBUG)

    def _log(self, level: int, name: str, fields: dict[str, object]) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, Event(name, **self._always, **fields))
