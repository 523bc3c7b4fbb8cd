"""What the KMS refuses, and why: one family, whose classes say what kind of refusal it is and whose text is upstream's.

A front end answers with the text; the class decides a gRPC status code. `context` adds the outer words of an error
chain (`App not allowed: Boot denied: …`) as upstream's anyhow chains have them.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from attest.errors import AttestError, UnjudgedError


class KmsError(Exception):
    """Anything the KMS refuses."""

    def within(self, context: str) -> Self:
        """The same refusal with one more outer context."""
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


class WrongPhaseError(KmsError):
    """The KMS is past that: bootstrapped, or onboarded, already."""


class ConfigError(KmsError):
    """A configuration that this KMS cannot run with; the text names file and key."""


@contextmanager
def context(text: str, otherwise: type[KmsError] = NotAttestedError) -> Iterator[None]:
    """Put `text` before every refusal from inside.

    A refusal of the protocol package becomes one of kind `otherwise`, and of kind `UnavailableError` where evidence
    could not be judged.
    """
    try:
        yield
    except KmsError as error:
        raise error.within(text) from error
    except UnjudgedError as error:
        raise UnavailableError(f"{text}: {error}") from error
    except AttestError as error:
        raise otherwise(f"{text}: {error}") from error
