"""What ends a run of the runbook."""


class RunbookError(Exception):
    """The runbook cannot be run here; the text says why."""
