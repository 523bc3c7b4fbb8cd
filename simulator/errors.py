"""The errors of the emulated guest. Malformed input is `attest.errors.FormatError` instead."""


class GuestError(Exception):
    """The guest cannot serve a request in its present state, or (in the subclasses) because of its KMS."""


class GpuUnavailableError(GuestError):
    """A request for evidence of a GPU, which no emulated platform has."""


class KmsRefusedError(GuestError):
    """The KMS refused; the text is the KMS's."""


class KmsUnreachableError(GuestError):
    """The KMS sent no answer: it does not run, or not yet. Any answer, including a refusal, is another error."""
