"""The same seed gives the same bytes in every process, another seed shares none of them."""

import pytest

from tests.running import running_stack
from tests.stack_bytes import Bytes, everything

SHARED = {"kms-src/rpc-domain", "kms-dst/rpc-domain"}
"""What no seed is in."""


@pytest.fixture(scope="module")
def stacks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bytes]:
    """Stacks one after the other: two of one seed, one of another, and one that goes on where the first ended."""
    folder = tmp_path_factory.mktemp("stacks")
    runs = {"first": ("same", "a"), "second": ("same", "another"), "third": ("other", "c"), "resumed": ("same", "a")}
    found = {}
    for name, (seed, state) in runs.items():
        with running_stack("--seed", seed, "--state", str(folder / state)) as stack:
            found[name] = everything(stack.description)
    return found


@pytest.mark.parametrize("other", ["second", "resumed"])
def test_same_seed_gives_the_same_bytes(stacks: dict[str, Bytes], other: str) -> None:
    first, second = stacks["first"], stacks[other]
    assert list(first) == list(second)
    assert {name for name in first if first[name] != second[name]} == set()


def test_another_seed_shares_no_bytes(stacks: dict[str, Bytes]) -> None:
    first, third = stacks["first"], stacks["third"]
    assert list(first) == list(third)
    assert {name for name in first if first[name] == third[name]} == SHARED
