"""What the emulated guest refuses beside malformed input (which is `attest.errors.FormatError`)."""


class GuestError(Exception):
    """A guest that cannot do what it was asked: as it is now, unless a subclass says who refused."""


class KmsRefusedError(GuestError):
    """A KMS refused, in its own words."""


class KmsUnreachableError(GuestError):
    """A KMS that nothing came from: it is not up yet, or not there. Any answer, a refusal too, is another error."""
