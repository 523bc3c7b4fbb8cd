"""Times for people and for Intel's documents: ISO 8601 in UTC, to the second."""

import datetime


def iso(moment: datetime.datetime | float) -> str:
    """Return a time, which may be in Unix seconds, as Intel writes it, such as 2026-01-01T00:00:00Z.

    Raises `ValueError`, `OverflowError` or `OSError` for seconds of a year that no date can have.
    """
    if not isinstance(moment, datetime.datetime):
        moment = datetime.datetime.fromtimestamp(int(moment), datetime.UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}"
