"""Raw HTTP that the real programs were sent, one test for each recorded row, over TCP, a socket file and TLS."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from dstack_emu.transport.listen import Server, bind_tcp, bind_unix
from tests.http_edge import REFUSED_ON_PURPOSE, UNANSWERED, EdgeRow, edge_rows
from tests.identities import self_signed, server_tls
from tests.raw_requests import SDK_FORMS, SMUGGLED
from tests.toy import Answer, Toy, application, connect, read_answer, served

KMS_ROWS = {row.name: row for row in edge_rows("kms-tls")}
AGENT_ROWS = {row.name: row for row in edge_rows("agent-unix")}
SILENCE = 0.3
"""Seconds after which a server counts as silent."""
LIMIT = 60.0


@asynccontextmanager
async def reached(way: str, service: str, folder: Path) -> AsyncIterator[tuple[Server, ssl.SSLContext | None]]:
    """Serve the toy in one of the three ways; give the server, and how its clients trust it."""
    if way == "tls":
        identity = self_signed(folder, "server")
        trust = ssl.create_default_context(cafile=identity.cert_file)
        async with served(application(Toy(), service), tls=server_tls(identity)) as server:
            yield server, trust
    else:
        sock = bind_tcp("127.0.0.1", 0) if way == "tcp" else bind_unix(folder / "s.sock")
        async with served(application(Toy(), service), sock) as server:
            yield server, None


async def _answers(server: Server, trust: ssl.SSLContext | None, row: EdgeRow) -> list[Answer]:
    """Send a row's bytes, and read as many answers as the real program gave."""
    reader, writer = await connect(server, trust)
    try:
        async with asyncio.timeout(LIMIT):
            writer.write(row.request)
            return [await read_answer(reader) for _ in row.statuses]
    finally:
        writer.transport.abort()


def _check(row: EdgeRow, answers: list[Answer]) -> None:
    if row.name in REFUSED_ON_PURPOSE:
        assert [answer.status for answer in answers] == [400]
        return
    assert tuple(answer.status for answer in answers) == row.statuses
    for answer in answers:
        if answer.status == 200:
            assert answer.headers["content-type"] == row.content_type
            assert "content-encoding" not in answer.headers
        elif answer.status == 404:
            assert answer.headers["content-type"] == row.content_type
        else:
            assert answer.body == b""


@pytest.mark.parametrize("way", ["tcp", "unix", "tls"])
@pytest.mark.parametrize("name", [name for name in KMS_ROWS if name not in UNANSWERED])
async def test_raw_request_to_a_kms_is_answered_as_by_the_real_one(way: str, name: str, tmp_path: Path) -> None:
    async with reached(way, "kms", tmp_path) as (server, trust):
        _check(KMS_ROWS[name], await _answers(server, trust, KMS_ROWS[name]))


@pytest.mark.parametrize("way", ["tcp", "unix", "tls"])
@pytest.mark.parametrize("name", AGENT_ROWS)
async def test_raw_request_to_an_agent_is_answered_as_by_the_real_one(way: str, name: str, tmp_path: Path) -> None:
    async with reached(way, "guest", tmp_path) as (server, trust):
        _check(AGENT_ROWS[name], await _answers(server, trust, AGENT_ROWS[name]))


@pytest.mark.parametrize("way", ["tcp", "unix", "tls"])
@pytest.mark.parametrize("name", UNANSWERED)
async def test_body_that_does_not_come_is_waited_for_as_by_the_real_kms(way: str, name: str, tmp_path: Path) -> None:
    async with reached(way, "kms", tmp_path) as (server, trust):
        reader, writer = await connect(server, trust)
        writer.write(KMS_ROWS[name].request)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(SILENCE):
                await reader.read(1)
        writer.close()


@pytest.mark.parametrize("rows", [KMS_ROWS, AGENT_ROWS], ids=["kms", "agent"])
async def test_idle_connection_is_kept_as_by_the_real_programs(rows: dict[str, EdgeRow], tmp_path: Path) -> None:
    row = rows["keepalive_idle_until_server_closes"]
    async with reached("tcp", "kms" if rows is KMS_ROWS else "guest", tmp_path) as (server, trust):
        reader, writer = await connect(server, trust)
        for _ in range(2):
            writer.write(row.request)
            assert (await read_answer(reader)).status == 200
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(SILENCE):
                    await reader.read(1)
        writer.close()


@pytest.mark.parametrize("way", ["tcp", "unix", "tls"])
@pytest.mark.parametrize("form", SDK_FORMS)
async def test_request_of_the_rust_sdk_is_answered_in_every_way(way: str, form: str, tmp_path: Path) -> None:
    async with reached(way, "guest", tmp_path) as (server, trust):
        reader, writer = await connect(server, trust)
        for _ in range(2):
            writer.write(SDK_FORMS[form]("/GetKey", b'{"path":"a"}'))
            answer = await read_answer(reader)
            assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
        writer.close()


@pytest.mark.parametrize("way", ["tcp", "unix", "tls"])
@pytest.mark.parametrize("form", SMUGGLED)
async def test_request_that_could_be_read_in_two_ways_is_refused_in_every_way(
    way: str, form: str, tmp_path: Path
) -> None:
    async with reached(way, "guest", tmp_path) as (server, trust):
        reader, writer = await connect(server, trust)
        writer.write(
            SMUGGLED[form]("/GetKey", b'{"path":"a"}') + SDK_FORMS["TappdClient over a socket"]("/Version", b"")
        )
        async with asyncio.timeout(LIMIT):
            answer = await read_answer(reader)
            assert (answer.status, answer.headers["connection"]) == (400, "close")
            assert await reader.read() == b""
        writer.close()
