"""The errors of a request without an answer, with texts that do not depend on library, event loop or Python version."""

import os
import re
import socket
import ssl
from typing import Final

_LINE_OF_PYTHON: Final = re.compile(r" \(_ssl\.c:\d+\)")
"""Where in the source of Python OpenSSL's error was found: another place in each version."""


class NoAnswerError(Exception):
    """A request got no readable answer; the text says why."""


class NoAnswerInTimeError(NoAnswerError, TimeoutError):
    """The answer to a request did not come in time."""


class AnswerTooLongError(Exception):
    """The body of an answer is longer than the limit; the text has the limit."""


def describe_failure(error: Exception, timeout: float) -> str:
    """Return the text of a failure; `timeout` is the timeout of the whole request in seconds."""
    if isinstance(error, ssl.SSLError):
        return f"TLS: {_LINE_OF_PYTHON.sub('', str(error))}"
    if isinstance(error, socket.gaierror):
        return f"no such host: {error}"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout:g} s"
    if isinstance(error, ConnectionError):  # raised by an event loop, without an errno
        return "TLS: connection closed within the handshake"
    return str(error) if isinstance(error, NoAnswerError) else f"{type(error).__name__}: {error}"
