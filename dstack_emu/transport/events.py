"""What a service logs: named events with fields, not sentences.

An event is one log record of the standard library, whose message is `name key=value …` to whoever formats it as text;
`dstack_emu/cli/logs.py` writes its fields as JSON too. Not here: where logs go, and which are shown.
"""

import json
import logging
import re
from typing import Final

LOGGERS: Final = "dstack_emu."
"""What the name of every logger of the project begins with; where logs are shown it is left out."""

_PLAIN: Final = re.compile(r"[^\s\"=\x00-\x1f\x7f-\x9f]+")


class Event:
    """A name and its fields; as text `name key=value …`, with values quoted where they are more than one word."""

    __slots__ = ("fields", "name")

    def __init__(self, name: str, **fields: object) -> None:
        self.name, self.fields = name, fields

    def __str__(self) -> str:
        return " ".join((self.name, *(f"{key}={_shown(value)}" for key, value in self.fields.items())))


def _shown(value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def logger_name(record: logging.LogRecord) -> str:
    """Name a record's logger as logs show it."""
    return record.name.removeprefix(LOGGERS)


class EventLog:
    """Logs events of one part, each with the fields that say which part it is. Secrets are the caller's not to pass."""

    def __init__(self, logger: str, **always: object) -> None:
        self._logger, self._always = logging.getLogger(logger), always

    def debug(self, name: str, **fields: object) -> None:
        """Log what happens at every call."""
        self._log(logging.DEBUG, name, fields)

    def info(self, name: str, **fields: object) -> None:
        """Log what changes something, or refuses it."""
        self._log(logging.INFO, name, fields)

    def warning(self, name: str, **fields: object) -> None:
        """Log what an operator should look at."""
        self._log(logging.WARNING, name, fields)

    def error(self, name: str, **fields: object) -> None:
        """Log what ends the part."""
        self._log(logging.ERROR, name, fields)

    def is_debug(self) -> bool:
        """Whether `debug` is heard: what only it needs can be spared otherwise."""
        return self._logger.isEnabledFor(logging.DEBUG)

    def _log(self, level: int, name: str, fields: dict[str, object]) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, Event(name, **self._always, **fields))
