"""The error of a check that cannot be carried out."""


class UnusableError(Exception):
    """The KMS does not start, or has no keys when it needs them: it cannot be checked. The text says why."""
