"""Fixtures that several test files share."""

from collections.abc import Iterator

import pytest

from tests.running import RunningStack, running_stack


@pytest.fixture(scope="module")
def ready_stack() -> Iterator[RunningStack]:
    """One ready stack for the tests of a file; a test that changes a policy puts it back."""
    with running_stack() as stack:
        yield stack


@pytest.fixture
def fresh_stack() -> Iterator[RunningStack]:
    """A stack at the runbook's starting point, for one test."""
    with running_stack("--fresh") as stack:
        yield stack
