"""Why a request got no answer, in words that do not depend on a library, an event loop or a release of Python."""

import os
import socket
import ssl


class NoAnswerError(Exception):
    """A request that got no answer that can be read; the text says why."""


class NoAnswerInTimeError(NoAnswerError, TimeoutError):
    """A request whose answer did not come in time."""


class AnswerTooLongError(Exception):
    """An answer with a longer body than is read; the text says which length that is."""


def describe_failure(error: Exception, timeout: float) -> str:
    """Name what went wrong; `timeout` is how many seconds were waited for the whole."""
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error}"
    if isinstance(error, socket.gaierror):
        return f"no such host: {error}"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout:g} s"
    if isinstance(error, ConnectionError):  # an event loop's own, which has no number
        return "TLS: connection closed within the handshake"
    return str(error) if isinstance(error, NoAnswerError) else f"{type(error).__name__}: {error}"
