"""The error of a check that cannot be made."""


class UnusableError(Exception):
    """The KMS does not start, or has no keys when it needs them: nothing can be said about it. The text says why."""
