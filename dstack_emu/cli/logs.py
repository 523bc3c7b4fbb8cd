"""Logs on stderr: one line for each event, as text or as JSON.

Indented JSON in a message is folded to one line, control characters are escaped, and a traceback is one quoted field.
User names and passwords in URLs and private keys in PEM are removed, because text from elsewhere may contain them.
"""

import datetime
import json
import logging
import re
import sys
from collections.abc import Sequence
from typing import Final, Literal

from dstack_emu.transport.events import LOGGERS, Event, logger_name

Form = Literal["text", "json"]

LEVELS: Final = {
    "off": logging.CRITICAL + 1,
    "error": logging.ERROR,
    "warn": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
    "trace": logging.DEBUG,
}
"""Names of RUST_LOG's levels."""

_FOLD: Final = re.compile(r"\s*[\r\n]\s*")
_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_USER_INFO: Final = re.compile(r"://[^/@\s\"]+@")
_PRIVATE_KEY: Final = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)


def set_up(verbosity: int, form: Form, talkative: Sequence[str] = (), level: str | None = None) -> None:
    """Send the logs of this process to stderr.

    `verbosity` 0 shows warnings, 1 information, 2 everything; the loggers in `talkative` show one level more.
    `level`, one of LEVELS, replaces verbosity 0.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    steps = (logging.WARNING, logging.INFO, logging.DEBUG)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(LEVELS[level] if level and not verbosity else steps[min(verbosity, 2)])
    for name in talkative:
        ahead = LEVELS[level] if level and not verbosity else steps[min(verbosity + 1, 2)]
        logging.getLogger(LOGGERS + name).setLevel(ahead)


def level_of(rust_log: str) -> str | None:
    """Return the level that RUST_LOG sets, or None; directives for single crates have no effect."""
    words = (word.strip().lower() for word in rust_log.split(","))
    return next((word for word in words if word in LEVELS), None)


class TextFormatter(logging.Formatter):
    """`2026-01-01T00:00:00.000Z info kms_emu: bootstrapped domain=kms.example.test`."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as one line."""
        event = record.msg
        if isinstance(event, Event):
            text = str(Event(_clean(event.name), **_clean_fields(event)))
        else:
            text = _clean(record.getMessage())
        line = f"{_time(record)} {_level(record)} {logger_name(record)}: {text}"
        if record.exc_info:
            line += f" exception={json.dumps(_safe(self.formatException(record.exc_info)), ensure_ascii=False)}"
        return _CONTROL.sub(_escape, line)


class JsonFormatter(logging.Formatter):
    """One JSON object in a line: time, level, logger, event, and the fields of the event."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as one line."""
        event = record.msg if isinstance(record.msg, Event) else Event(record.getMessage())
        line: dict[str, object] = {
            "time": _time(record),
            "level": _level(record),
            "logger": logger_name(record),
            "event": _clean(event.name),
        }
        line |= _clean_fields(event)
        if record.exc_info:
            line["exception"] = _safe(self.formatException(record.exc_info))
        return json.dumps(line)


def _time(record: logging.LogRecord) -> str:
    moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _level(record: logging.LogRecord) -> str:
    return "warn" if record.levelno == logging.WARNING else record.levelname.lower()


def _clean(text: str) -> str:
    return _FOLD.sub(" ", _safe(text))


def _clean_fields(event: Event) -> dict[str, object]:
    return {key: value if isinstance(value, bool | int) else _clean(str(value)) for key, value in event.fields.items()}


def _safe(text: str) -> str:
    """Remove user names, passwords and private keys from a text."""
    if "://" in text:
        text = _USER_INFO.sub("://…@", text)
    return _PRIVATE_KEY.sub("(a private key)", text) if "PRIVATE KEY" in text else text


def _escape(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"
