"""What the KMS refuses, and why: one family, whose classes say what kind of refusal it is and whose text is upstream's.

A server answers with the text; the class determines the gRPC status code. `context` adds the outer words of an error
chain (`App not allowed: Boot denied: …`) as upstream's anyhow chains have them.
"""

import copy
from typing import Self

from dstack_emu.attest.errors import AttestError, UnverifiableError
from dstack_emu.transport.errors import ConfigError


class KmsError(Exception):
    """Anything the KMS refuses."""

    def within(self, context: str) -> Self:
        """Return the same refusal with one more outer context."""
        outer = copy.copy(self)
        outer.args = (f"{context}: {self}",)
        return outer


class InvalidRequestError(KmsError):
    """An argument that cannot be: an API version, a domain, an app id, a signing request."""


class NotAttestedError(KmsError):
    """No evidence, or evidence that does not hold."""


class BootDeniedError(KmsError):
    """The auth webhook said no, or the source KMS did."""


class UnavailableError(KmsError):
    """The webhook, the PCCS, the guest agent or the source KMS gave no usable answer: never taken for a yes."""


class DisabledError(KmsError):
    """The configuration has switched it off."""


class WrongPhaseError(KmsError):
    """The KMS is past that: bootstrapped, or onboarded, already."""


class KmsConfigError(KmsError, ConfigError):
    """A configuration or a stored file that this KMS cannot run with; the text names file and key."""


class context:
    """Put `text` before every refusal from inside. (Written by hand: contextlib's costs five times as much, each call.)

    A refusal of the protocol package becomes one of kind `otherwise`, and of kind `UnavailableError` where evidence
    could not be verified.
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
