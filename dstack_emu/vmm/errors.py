"""What the VMM refuses. The text of an error goes to the caller."""


class VmmError(Exception):
    """A call that is refused, with upstream's text where upstream has one."""


class UnknownVmError(VmmError):
    """There is no machine of that id."""
