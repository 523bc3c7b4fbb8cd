"""The campaign of listeners finds what each of its rules forbids; its listeners here are a few lines each."""

import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from random import Random

import pytest

from campaigns import listeners
from campaigns.case import Act
from campaigns.listener_places import Place, Process, address, pieces, whole_answer
from campaigns.listener_requests import BINARY, CHANGES, client_hello, http
from campaigns.listeners import CAMPAIGN, NAMES, Listeners

VALID = http("GET", "/")
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
ERROR = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n"


class Toy:
    """A listener that does something wrong after a request that is not the valid one."""

    def __init__(self, fault: str) -> None:
        self.fault, self.is_hit, self.kept = fault, False, list[int]()
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `close`
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self) -> None:
        while True:
            connection, _ = self.sock.accept()
            with connection:
                if (said := connection.recv(65536)) == b"end":
                    return
                connection.sendall(self.answer(said))

    def answer(self, said: bytes) -> bytes:
        if said == VALID:
            return OK.replace(b"{}", b"[]") if self.is_hit and self.fault == "another answer" else OK
        self.is_hit = True
        if self.fault == "traceback":
            self.log.write('{"event": "failed", "exception": "Traceback (most recent call last):\\nKeyError: 7"}\n')
            self.log.flush()
        if self.fault == "open files" and len(self.kept) < 40:
            self.kept += [os.dup(0) for _ in range(40)]
        return ERROR if self.fault == "status 500" else OK

    def close(self) -> None:
        with socket.create_connection(self.sock.getsockname()) as sock:
            sock.sendall(b"end")
        self.thread.join()
        self.sock.close()
        self.log.close()
        for each in self.kept:
            os.close(each)


@pytest.fixture(params=["nothing", "another answer", "traceback", "open files", "status 500"])
def toy(request: pytest.FixtureRequest) -> Iterator[Toy]:
    toy = Toy(request.param)
    try:
        yield toy
    finally:
        toy.close()


def test_broken_rule_is_found(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listeners, "SETTLED", 0.0)
    connect = address(f"http://127.0.0.1:{toy.sock.getsockname()[1]}")
    place = Place("toy", connect, (VALID,), lambda: whole_answer(connect, VALID))
    world = Listeners([place], [Process(os.getpid(), toy.log)])
    outcome = world.run((Act("malformed chunks", {"listener": "toy", "how": "at once", "number": 1}),))
    expected = {
        "nothing": [],
        "another answer": ["toy: another answer"],
        "traceback": ["traceback: KeyError: 7"],
        "open files": ["open files"],
        "status 500": ["toy: status 500"],
    }
    assert [found.rule for found in outcome.findings] == expected[toy.fault]
    assert outcome.counts["valid requests answered"] == 1


@pytest.mark.parametrize("change", CHANGES)
def test_change_is_the_same_for_the_same_seed_and_differs_from_the_request(change: str) -> None:
    request = http("POST", "/a", b"{}") if change not in BINARY else client_hello("a.example")
    made = [CHANGES[change](request, [request], Random(7)) for _ in range(2)]
    assert made[0] == made[1] != request


def test_pieces_are_the_whole() -> None:
    for seed in range(20):
        assert b"".join(pieces(VALID, Random(seed))) == VALID
    assert b"".join(pieces(b"", Random(1))) == b""


def test_what_is_no_http_gets_no_change_of_http() -> None:
    acts = [act for seed in range(200) for act in CAMPAIGN.draw(Random(seed))]
    assert {act.fields["listener"] for act in acts} == set(NAMES)
    assert {act.name for act in acts if act.fields["listener"] == "ingress"} == set(BINARY)
