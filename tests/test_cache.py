"""Caches: bounded in entries and in bytes, and forgetting what was used longest ago."""

import pytest

from dstack_emu.attest.cache import BoundedCache, Latest, Memo


def test_entry_used_longest_ago_makes_room_for_a_new_one() -> None:
    cache = BoundedCache[str, int](2, 100)
    cache.put("a", 1, 1)
    cache.put("b", 2, 1)
    assert cache.get("a") == 1
    cache.put("c", 3, 1)
    assert (cache.get("a"), cache.get("b"), cache.get("c"), len(cache), cache.size) == (1, None, 3, 2, 2)


def test_bytes_are_bounded_beside_entries() -> None:
    cache = BoundedCache[str, int](100, 10)
    cache.put("a", 1, 6)
    cache.put("b", 2, 4)
    assert (len(cache), cache.size) == (2, 10)
    cache.put("c", 3, 5)
    assert (cache.get("a"), cache.get("b"), cache.get("c"), cache.size) == (None, 2, 3, 9)


def test_entry_larger_than_the_whole_cache_is_not_kept_and_drives_nothing_out() -> None:
    cache = BoundedCache[str, int](100, 10)
    cache.put("a", 1, 10)
    cache.put("b", 2, 11)
    assert (cache.get("a"), cache.get("b"), cache.size) == (1, None, 10)


def test_value_that_is_replaced_counts_once() -> None:
    cache = BoundedCache[str, int](100, 10)
    cache.put("a", 1, 6)
    cache.put("a", 2, 7)
    assert (cache.get("a"), len(cache), cache.size) == (2, 1, 7)
    cache.put("a", 3, 11)
    assert (cache.get("a"), len(cache), cache.size) == (None, 0, 0)


def test_cleared_cache_is_empty() -> None:
    cache = BoundedCache[str, int](100, 10)
    cache.put("a", 1, 6)
    cache.discard("b")
    cache.clear()
    assert (cache.get("a"), len(cache), cache.size) == (None, 0, 0)


def test_memo_calls_its_function_once_for_an_argument_and_again_after_an_error() -> None:
    called: list[str] = []

    def upper(text: str) -> str:
        called.append(text)
        if text == "bad":
            raise ValueError
        return text.upper()

    memo = Memo(upper, lambda text, result: len(text) + len(result), max_entries=2, max_bytes=8)
    assert [memo("ab"), memo("ab"), memo("long text"), memo("long text")] == ["AB", "AB", "LONG TEXT", "LONG TEXT"]
    for _ in range(2):
        with pytest.raises(ValueError, match="^$"):
            memo("bad")
    assert called == ["ab", "long text", "long text", "bad", "bad"]


def test_latest_result_is_kept_for_the_last_argument_alone() -> None:
    called: list[tuple[int, ...]] = []

    def total(numbers: tuple[int, ...]) -> int:
        called.append(numbers)
        return sum(numbers)

    latest = Latest(total)
    assert [latest(tuple(numbers)) for numbers in ([1, 2], [1, 2], [3], [1, 2])] == [3, 3, 3, 3]
    assert called == [(1, 2), (3,), (1, 2)]
