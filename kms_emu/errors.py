"""The refusals of a KMS: the class is the kind of refusal, the text is upstream's.

A server answers with the text; the class determines the gRPC status code. `context` adds the outer words of an error
chain (`App not allowed: Boot denied: …`), as upstream's anyhow does.
"""

import copy
from typing import Self

from dstack_emu.attest.errors import AttestError, UnverifiableError
from dstack_emu.transport.errors import ConfigError


class KmsError(Exception):
    """A refusal of the KMS."""

    def within(self, context: str) -> Self:
        """Return the same refusal with one more outer context."""
        outer = copy.copy(self)
        outer.args = (f"{context}: {self}",)
        return outer


class InvalidRequestError(KmsError):
    """An invalid argument: an API version, a domain, an app id, a signing request."""


class NotAttestedError(KmsError):
    """Evidence is missing or invalid."""


class BootDeniedError(KmsError):
    """The auth webhook or the source KMS denied."""


class UnavailableError(KmsError):
    """The webhook, the PCCS, the guest agent or the source KMS gave no usable answer, which never allows."""


class DisabledError(KmsError):
    """The configuration has switched off what was requested."""


class WrongPhaseError(KmsError):
    """The KMS is bootstrapped or onboarded already, or another phase serves the RPC."""


class KmsConfigError(KmsError, ConfigError):
    """A configuration or a stored file that this KMS cannot run with; the text names file and key."""


class context:
    """Put `text` before the text of every refusal that is raised inside.

    An error of the protocol package becomes one of class `otherwise`, or `UnavailableError` if evidence could not be
    verified. It is a class because a generator with `contextlib.contextmanager` takes five times as long in each call.
    """

    __slots__ = ("_otherwise", "_text")

    def __init__(self, text: str, otherwise: type[KmsError] = NotAttestedError) -> None:
        self._text, self._otherwise = text, otherwise

    def __enter__(self) -> None: ...

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, KmsError):
            raise error.within(self._text) from error
        if isinstance(error, ConfigError):
            raise KmsConfigError(f"{self._text}: {error}") from error
        if isinstance(error, UnverifiableError):
            raise UnavailableError(f"{self._text}: {error}") from error
        if isinstance(error, AttestError):
            raise self._otherwise(f"{self._text}: {error}") from error
