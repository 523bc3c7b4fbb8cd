"""The errors of a deployment that does not start, or that ends while it runs."""


class StackError(Exception):
    """The stack cannot be started or changed; the text names the part, and what to do about it."""


class PartEndedError(Exception):
    """A part failed while the stack ran; the text names it. The other parts have been stopped by then."""
