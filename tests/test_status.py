"""Statuses in words, against those of the program that upstream's errors are written by."""

import pytest

from dstack_emu.transport.status import status_line

# Rust's `http` crate 1.3.1, src/status.rs: those where Python, in one version or another, has other words.
CANONICAL = {
    200: "OK",
    203: "Non Authoritative Information",
    302: "Found",
    413: "Payload Too Large",
    414: "URI Too Long",
    416: "Range Not Satisfiable",
    418: "I'm a teapot",
    422: "Unprocessable Entity",
    505: "HTTP Version Not Supported",
    599: "<unknown status code>",
}


@pytest.mark.parametrize("status", CANONICAL)
def test_status_is_named_as_upstream_names_it(status: int) -> None:
    assert status_line(status) == f"{status} {CANONICAL[status]}"
