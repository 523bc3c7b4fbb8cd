"""The fuzzer finds what its rules say, and what it once found stays mended."""

import json
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from random import Random

import pytest

from campaigns.fuzz import growth
from campaigns.fuzz.__main__ import minimized, shared_out
from campaigns.fuzz.judge import answer, canonical, judge
from campaigns.fuzz.target import Target
from campaigns.fuzz.targets import TARGETS
from campaigns.fuzz.worker import Run, slots_of

COUNTED: Iterator[int] = count()


def toy(read: Callable[[bytes], object]) -> Target:
    return Target("toy", read, lambda: [b""], (ValueError,))


def refuse(data: bytes) -> object:
    raise ValueError(f"{len(data)} bytes")


def fail_at_x(data: bytes) -> object:
    if b"x" in data:
        raise KeyError("x")
    return refuse(data)


def spin(data: bytes) -> object:
    return sum(number * number for number in range(100_000 if data else 0))


@pytest.mark.parametrize(
    ("read", "rule"),
    [
        (refuse, None),
        (lambda data: {"a", "b"}, None),
        (fail_at_x, "KeyError"),
        (lambda data: next(COUNTED), "another answer"),
        (lambda data: f"<it at 0x{id(data):x}>", "an address"),
        (lambda data: "x" * 100_000, "long answer"),
        (lambda data: len(bytearray(100_000_000)), "memory"),
        (spin, "slow"),
    ],
)
def test_broken_rule_is_found(
    monkeypatch: pytest.MonkeyPatch, read: Callable[[bytes], object], rule: str | None
) -> None:
    if rule == "slow":
        monkeypatch.setattr("campaigns.fuzz.judge.SECONDS", 1e-4)
    found = judge(toy(read), b"ax", thoroughly=True)
    assert (found.rule if found else None) == rule


def test_input_is_minimized_to_what_breaks_the_rule() -> None:
    found = judge(toy(fail_at_x), b"abcxdefx")
    assert found is not None
    assert minimized(toy(fail_at_x), found.to_json()) == b"x"


def compare_each_with_each(data: bytes) -> object:
    return sum(one == other for one in data[::256] for other in data[::256])


def make_many_objects(data: bytes) -> object:
    return [[each] for each in data] and len(data)


def called_within(calls: int, target: Target, data: bytes) -> str:
    return called_within(calls - 1, target, data) if calls else answer(target, data)


@pytest.mark.parametrize(("target", "form"), [("control-request", b'\2{"freeze": %b%b}'), ("strict-json", b"%b%b")])
def test_answer_to_a_deep_document_does_not_depend_on_the_calls_around_it(target: str, form: bytes) -> None:
    answers = []
    for depth in (20, *range(840, 1000, 8)):
        data = form % (b"[" * depth, b"]" * depth)
        answers.append(called_within(0, TARGETS[target], data))
        assert called_within(40, TARGETS[target], data) == answers[-1]
    assert len(set(answers)) > 1


@pytest.mark.parametrize(
    ("read", "rules"), [(compare_each_with_each, ["superlinear"]), (make_many_objects, []), (fail_at_x, [])]
)
def test_cost_that_grows_faster_than_the_size_is_found(
    monkeypatch: pytest.MonkeyPatch, read: Callable[[bytes], object], rules: list[str]
) -> None:
    monkeypatch.setattr(growth, "LEAST", 0.01)
    number, found = growth.judge_stretched(toy(read), [b"abc"], Random(1))
    assert (number, [each.rule for each in found]) == (3, rules)


def test_answer_does_not_depend_on_the_order_of_a_set() -> None:
    assert canonical({"b", "a"}) == canonical({"a", "b"}) == "{'a', 'b'}"
    assert answer(toy(refuse), b"abc") == "ValueError: 3 bytes"


def test_each_target_has_its_share_of_the_inputs() -> None:
    assert shared_out(["quote", "rlp"], 300, 0) == [(["quote"], 100), (["rlp"], 200)]
    assert shared_out(["quote", "rlp", "abi"], 300, 2) == [(["quote", "abi"], 200), (["rlp"], 100)]


def test_target_has_values_of_the_first_byte_by_its_weight() -> None:
    assert slots_of([1, 2, 0.5]) == [0, 0, 1, 1, 1, 1, 2]
    assert len(slots_of([each.weight for each in TARGETS.values()])) <= 256


def test_run_keeps_the_shortest_input_of_a_finding_and_compares_answers_at_its_end(tmp_path: Path) -> None:
    state: Iterator[int] = count()
    later = toy(lambda data: "early" if next(state) < 8 else "late")
    run = Run([toy(fail_at_x), later], 4, 60, tmp_path / "result.json")
    for data in (b"\0aax", b"\0x", b"\0bbbx", b"\1y"):
        run.one(data)
    for _ in range(8):
        next(state)
    run.end()
    document = json.loads((tmp_path / "result.json").read_text())
    found = [(each["rule"], bytes.fromhex(each["data"]), each["times"]) for each in document["found"]]
    assert found == [("KeyError", b"x", 3), ("another answer", b"y", 1)]
    assert document["inputs"] == {"toy": 4}


FOUND = [
    pytest.param(
        "keys",
        b"-----BEGIN PRIVATE KEY-----\n"
        b"MIGHAgEAMBMGByqGSM48AgEGCCqGSM49AwEHBG0wawIBAQQgDypsBvkRFOn/XOvY\n"
        b"1f/zxgU5ytCriJna7gkY9Gj145OhRANCAASYQu+LLD5aK1aLwS/TuXS+65BRPhzK\n"
        b"5FQ8M2zfKsVHqo4VJZd1bRxn+kzqPIBfELSKiNy5nDyd/z7LvuuLQDvP\n"
        b"-----END PRIVATE KEY-----\n",
        id="a private key of an algorithm that nobody knows",
    ),
    pytest.param("overrides", b"X_A=" + b"4" * 5000, id="a variable of more digits than Python reads"),
    pytest.param("overrides", b"X_A=" + b"[" * 5000, id="a variable of many lists in each other"),
    pytest.param("overrides", b"X_" + b"A__" * 5000 + b"B=1", id="a variable of many sections in each other"),
    pytest.param("gateway.toml", b"port = " + b"4" * 5000, id="a configuration of more digits than Python reads"),
    pytest.param("control-request", b'\2{"freeze": "x"}', id="a time that is none, in place of true or a time"),
    pytest.param("gateway.toml", b"a = " + b"[" * 5000, id="a configuration of many lists in each other"),
]


@pytest.mark.parametrize(("target", "data"), FOUND)
def test_input_that_once_broke_a_rule_breaks_none(target: str, data: bytes) -> None:
    assert judge(TARGETS[target], data, thoroughly=True) is None
