"""The errors of the protocol package: one family, so that a caller catches `AttestError` and nothing foreign.

Foreign exceptions (cryptography, dcap-qvl, protobuf, msgpack, cbor2) are wrapped where they are raised. Messages say
what was got and what was expected, and never hold key material.
"""


class AttestError(Exception):
    """Anything this package refuses."""


class FormatError(AttestError):
    """Bytes or text that are not what their format says: truncated, oversized, mistyped, of an unknown version."""


class VerificationError(AttestError):
    """Well-formed evidence that proves nothing: a signature, a register, a date or a binding does not hold."""


class UnverifiableError(VerificationError):
    """Evidence that could not be verified, because collateral or an image was not available; it may be good."""
