"""The pRPC HTTP transport: recorded calls to a toy service, raw sockets, curl, the published SDK."""

import asyncio
import json
import logging
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from dstack_sdk import DstackClient

from dstack_emu.attest.proto.prpc_pb2 import PrpcError
from dstack_emu.transport.http import Request, Response
from dstack_emu.transport.http.application import MAX_BODY
from dstack_emu.transport.listen import bind_tcp, bind_unix
from tests.recorded import golden
from tests.toy import Toy, ToyError, application, connect, exchange, post, raw, read_answer, served

# ---- Recorded calls --------------------------------------------------------------------------------------

FOREIGN = re.compile(
    r"at line \d+|failed to decode Protobuf|invalid type:|invalid value:|duplicate field|trailing characters|"
    r"invalid unicode|Invalid character|Odd number"
)
ROWS = {
    "onboard": [
        *("unknown_method_json", "unknown_method_get", "kms_method_in_onboard_phase", "prefix_only"),
        *("prpc_slash", "prpc_none", "trailing_json", "json_array", "json_array1", "json_null"),
        *("missing_field", "wrong_type", "null_field", "dup_field", "invalid_utf8", "bad_domain_label"),
        *("domain_too_long", "domain_trailing_dot", "domain_nonascii", "domain_port"),
        *("json_by_content_type", "json_by_content_type_charset", "json_flag_true", "json_flag_1"),
        *("json_flag_0", "json_flag_false", "json_flag_False_then_true", "json_flag_eq_empty"),
        *("bin_empty", "bin_garbage", "bin_wrong_wire", "bin_bad_utf8", "bin_bad_domain", "bin_field0"),
        *("bin_octet_stream", "get_query_none", "get_query_json", "get_query_dup", "put", "patch"),
        *("metrics_not_mounted", "post_health", "finish_without_keys_rpc", "finish_rpc_bin"),
    ],
    "kms": [
        *("onboard_method_gone", "getmeta_bin", "envpub_id1", "envpub_get", "envpub_upper", "envpub_bin"),
        *("getappkey_apiver_str", "getappkey_apiver_neg", "envpub_odd_hex", "envpub_short"),
        *("envpub_missing", "envpub_empty_body", "envpub_get_badhex", "envpub_list", "envpub_bin_empty"),
        *("envpub_bin_garbage", "envpub_21", "unknown_method", "empty_bad_json", "empty_array_json"),
        *("empty_with_fields", "empty_bin_garbage", "put", "admin_on_main", "root"),
    ],
    "guest": [
        *("version", "version_prpc_path", "version_prefixed", "root", "unknown", "unknown_bin"),
        *("tappd_method", "getkey_empty_obj", "getkey_empty_body", "getkey_bin", "getkey_wrongtype"),
        *("getkey_json_no_ctype", "getkey_textplain", "getkey_json_query", "tls_null_opt", "tls_wrongtype"),
    ],
}


def rows_of(service: str) -> list[dict[str, Any]]:
    wanted = {"onboard": ("kms", "onboard"), "kms": ("kms", "runtime"), "guest": ("agent", "dstack.sock")}
    rows = [
        row
        for row in golden("wire.json")
        if (row["component"], row.get("phase") or row.get("socket")) == wanted[service] and row["name"] in ROWS[service]
    ]
    assert {row["name"] for row in rows} == set(ROWS[service])
    return rows


def request_body(request: dict[str, Any]) -> bytes:
    """A recorded body; bytes that JSON could not hold are written as a backslash, x and two digits."""
    if "body_hex" in request:
        return bytes.fromhex(request["body_hex"])
    text = request.get("body", "").encode()
    return re.sub(rb"\\x([0-9a-f]{2})", lambda found: bytes([int(found[1], 16)]), text)


def recorded_error(answer: dict[str, Any]) -> str:
    if answer["headers"]["content-type"] == "application/json":
        return str(json.loads(answer["body"])["error"])
    return PrpcError.FromString(request_body(answer)).message


@pytest.mark.parametrize("service", ["onboard", "kms", "guest"])
async def test_recorded_codec_calls_are_answered_as_by_the_real_program(service: str) -> None:
    async with served(application(Toy(), service)) as server:
        for row in rows_of(service):
            request, wanted, name = row["request"], row["response"], row["name"]
            headers = {"Content-Type": request["content_type"]} if request.get("content_type") else {}
            path = request["path"]
            answer = await exchange(server, raw(request["method"], path, request_body(request), headers))
            assert (answer.status, answer.headers.get("content-type")) == (
                wanted["status"],
                wanted["headers"]["content-type"],
            ), name
            if wanted["status"] == 400:
                text = recorded_error(wanted)
                if FOREIGN.search(text) is None:
                    assert answer.error == text, name
                else:
                    assert answer.error, name
                    assert answer.body.startswith(b'{\n  "error": "') == (answer.kind == "application/json"), name
            elif wanted["status"] == 200 and answer.kind == "application/json":
                assert (answer.body == b"null") == (wanted["body"] == "null"), name


async def test_a_body_of_exactly_the_limit_is_read_and_one_byte_more_is_not() -> None:
    toy = Toy()
    async with served(application(toy, "onboard")) as server:
        filler = b'{"domain":"' + b" " * (MAX_BODY - 13) + b'"}'
        assert len(filler) == MAX_BODY
        exact = await post(server, "/prpc/Onboard.Bootstrap?json", filler)
        assert exact.error == "domain must be a non-empty ASCII DNS name of at most 253 bytes"
        assert toy.seen == ["bootstrap"]
        larger = await post(server, "/prpc/Onboard.Bootstrap?json", filler + b" ")
        assert (larger.status, larger.error) == (400, "failed to read data: payload too large")
        assert toy.seen == ["bootstrap"]


async def test_an_oversized_body_is_refused_in_json_by_the_query_alone() -> None:
    async with served(application(Toy(), "onboard")) as server:
        body = bytes(MAX_BODY + 1)
        answer = await post(server, "/prpc/Onboard.Bootstrap", body, Content_Type="application/json")
        assert (answer.kind, answer.error) == (
            "application/octet-stream",
            "failed to read data: payload too large",
        )


# ---- The order of a call, and its errors -----------------------------------------------------------------


async def refusing(asked: Request) -> Request:
    raise ToyError("invalid quote: report data mismatch")


@pytest.mark.parametrize("path", ["/prpc/Onboard.Bootstrap", "/prpc/Nope"])
async def test_the_context_is_judged_before_the_name_and_the_content_type(path: str) -> None:
    async with served(application(Toy(), "onboard", context=refusing)) as server:
        by_query = await post(server, path + "?json", b"{")
        by_type = await post(server, path, b"{", Content_Type="application/json")
        by_verb = await exchange(server, raw("GET", path))
        assert [a.kind for a in (by_query, by_type, by_verb)] == [
            "application/json",
            "application/octet-stream",
            "application/json",
        ]
        for answer in (by_query, by_type, by_verb):
            assert (answer.status, answer.error) == (400, "invalid quote: report data mismatch")


async def test_an_unexpected_error_is_logged_and_answered_without_details(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with served(application(Toy(), "guest")) as server:
        with caplog.at_level(logging.ERROR, "dstack_emu.transport.prpc_server"):
            answer = await post(server, "/Broken?json")
    assert answer.body == b'{\n  "error": "internal error: ValueError"\n}'
    (record,) = [r for r in caplog.records if r.name == "dstack_emu.transport.prpc_server"]
    assert record.getMessage() == "'DstackGuest.Broken' failed"
    assert record.exc_info is not None


async def test_an_attest_error_is_answered_with_its_text_in_ascii() -> None:
    async with served(application(Toy(), "guest")) as server:
        assert (await post(server, "/Unproven?json")).body == b'{\n  "error": "quote is \\u00e9"\n}'
        assert (await post(server, "/Unproven")).error == "quote is é"


async def test_answers_are_ascii_on_one_line_over_a_kept_connection() -> None:
    async with served(application(Toy(), "kms")) as server:
        reader, writer = await connect(server)
        for _ in range(2):
            writer.write(raw("POST", "/prpc/KMS.GetMeta?json"))
            answer = await read_answer(reader)
            assert answer.headers["content-type"] == "application/json"
            assert answer.body.startswith(b'{"ca_cert":"\\u00e9","allow_any_upgrade":false,')
        writer.close()


async def test_an_empty_answer_is_null_in_json_and_no_bytes_in_protobuf() -> None:
    async with served(application(Toy(), "onboard")) as server:
        assert (await post(server, "/prpc/Finish?json", b"{bad")).body == b"null"
        binary = await post(server, "/prpc/Finish", b"\xff")
        assert (binary.status, binary.headers["content-length"], binary.kind) == (
            200,
            "0",
            "application/octet-stream",
        )


async def test_head_answers_as_get_without_a_body() -> None:
    async with served(application(Toy(), "kms")) as server:
        reader, writer = await connect(server)
        writer.write(raw("HEAD", "/prpc/KMS.GetMeta", close=True))
        head = (await reader.read()).decode()
        writer.close()
        assert head.startswith("HTTP/1.1 200 ")
        assert "content-type: application/json\r\n" in head.lower()
        assert head.endswith("\r\n\r\n")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/prpc/", 422),
        ("POST", "/prpc/", 422),
        ("POST", "/prpc//", 422),
        ("GET", "/prpc///", 422),
        ("PUT", "/prpc//", 404),
        ("PUT", "/prpc/", 404),
        ("GET", "/prpc", 404),
        ("DELETE", "/prpc/GetMeta", 404),
        ("POST", "/prpc/GetMeta/", 404),
        ("POST", "/GetMeta", 404),
    ],
)
async def test_what_nobody_serves_is_a_page_or_json_by_accept(method: str, path: str, status: int) -> None:
    async with served(application(Toy(), "kms")) as server:
        page = await exchange(server, raw(method, path))
        assert (page.status, page.headers["content-type"]) == (status, "text/html; charset=utf-8")
        assert b"<html>" in page.body
        for accept in ("application/json", "text/html;q=0.5, application/json", "*/*, application/json"):
            answer = await exchange(server, raw(method, path, headers={"Accept": accept}))
            assert (answer.status, answer.kind) == (status, "application/json"), accept
            assert json.loads(answer.body)["error"]["code"] == status
        for accept in ("*/*", "text/html, application/json", "application/json;q=x", ""):
            answer = await exchange(server, raw(method, path, headers={"Accept": accept}))
            assert (answer.status, answer.kind) == (status, "text/html"), accept


async def test_choices_of_an_accept_header_are_read_up_to_the_64th() -> None:
    async with served(application(Toy(), "kms")) as server:
        for others, kind in ((63, "application/json"), (64, "text/html")):
            accept = f"{'text/plain;q=0.5,' * others}application/json"
            answer = await exchange(server, raw("GET", "/nothing", headers={"Accept": accept}))
            assert (answer.status, answer.kind) == (404, kind)


async def test_a_page_of_the_owner_at_the_mount_goes_before_the_422() -> None:
    async def page(_request: Request) -> Response:
        return Response.of("dashboard", "text/plain")

    app = application(Toy(), "guest", "kms")
    app.add("GET", "/", page)
    async with served(app) as server:
        assert (await exchange(server, raw("GET", "/"))).body == b"dashboard"
        assert (await exchange(server, raw("POST", "/"))).status == 422
        assert (await exchange(server, raw("GET", "/prpc/"))).status == 422
        assert json.loads((await post(server, "/prpc/GetMeta?json")).body)["ca_cert"] == "é"
        assert json.loads((await post(server, "/Version?json")).body)["version"] == "1"


# ---- How requests arrive ---------------------------------------------------------------------------------


@pytest.fixture(params=["tcp", "unix"])
def sock(request: pytest.FixtureRequest, tmp_path: Path) -> socket.socket:
    return bind_tcp("127.0.0.1", 0) if request.param == "tcp" else bind_unix(tmp_path / "s.sock")


async def test_a_client_that_half_closes_after_its_request_is_answered(sock: socket.socket) -> None:
    toy = Toy()
    async with served(application(toy, "guest"), sock) as server:
        reader, writer = await connect(server)
        writer.write(raw("POST", "/GetQuote?json", b'{"report_data":"0102"}'))
        writer.write_eof()
        await toy.started.wait()
        # A whole other call: by then the server has seen the end of file of the first connection.
        assert (await post(server, "/Version?json")).status == 200
        toy.may_answer.set()
        assert json.loads((await read_answer(reader)).body)["report_data"] == "0102"
        assert await reader.read() == b""  # and the server closes
        writer.close()


async def test_a_client_that_half_closes_while_idle_is_closed(sock: socket.socket) -> None:
    async with served(application(Toy(), "guest"), sock) as server:
        for sent in (b"", b"POST /Ver", raw("POST", "/Version?json")):
            reader, writer = await connect(server)
            writer.write(sent)
            if sent.startswith(b"POST /Version"):
                assert (await read_answer(reader)).status == 200
            writer.write_eof()
            assert await reader.read() == b""
            writer.close()


@pytest.mark.parametrize("count", [2, 80])
async def test_pipelined_requests_before_a_half_close_are_all_answered_in_order(
    sock: socket.socket, count: int
) -> None:
    async with served(application(Toy(), "guest"), sock) as server:
        reader, writer = await connect(server)
        for number in range(count):
            writer.write(raw("POST", "/GetKey?json", json.dumps({"path": str(number)}).encode()))
        writer.write_eof()
        for number in range(count):
            key = bytes.fromhex(json.loads((await read_answer(reader)).body)["key"])
            assert key.rstrip(b"\x00") == str(number).encode()
        assert await reader.read() == b""
        writer.close()


async def test_a_large_body_before_a_half_close_is_answered(sock: socket.socket) -> None:
    async with served(application(Toy(), "guest"), sock) as server:
        reader, writer = await connect(server)
        writer.write(raw("POST", "/GetTlsKey?json", json.dumps({"subject": "x" * 5_000_000}).encode()))
        writer.write_eof()
        answer = await read_answer_of_any_size(reader)
        assert len(json.loads(answer)["key"]) == 5_000_000
        writer.close()


async def read_answer_of_any_size(reader: asyncio.StreamReader) -> bytes:
    return (await reader.read()).partition(b"\r\n\r\n")[2]


async def test_a_half_close_within_a_body_ends_the_connection_and_reaches_no_handler(
    sock: socket.socket,
) -> None:
    toy = Toy()
    async with served(application(toy, "onboard"), sock) as server:
        reader, writer = await connect(server)
        whole = raw("POST", "/prpc/Bootstrap?json", b'{"domain":"a"}')
        writer.write(whole[:-1])
        writer.write_eof()
        await reader.read()
        writer.close()
        assert toy.seen == []


async def test_a_request_in_single_bytes_is_answered(sock: socket.socket) -> None:
    async with served(application(Toy(), "onboard"), sock) as server:
        reader, writer = await connect(server)
        for byte in raw("POST", "/prpc/Bootstrap?json", b'{"domain":"a.b"}'):
            writer.write(bytes([byte]))
            await writer.drain()
        assert json.loads((await read_answer(reader)).body)["ca_pubkey"] == b"a.b".hex()
        writer.close()


async def test_expect_100_continue_is_answered_before_the_body() -> None:
    async with served(application(Toy(), "onboard")) as server:
        reader, writer = await connect(server)
        request = raw("POST", "/prpc/Bootstrap?json", b'{"domain":"a"}', {"Expect": "100-continue"})
        head, _, body = request.partition(b"\r\n\r\n")
        writer.write(head + b"\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        assert (await read_answer(reader)).status == 200
        writer.close()


async def test_a_body_with_broken_chunks_is_an_error_and_reaches_no_handler() -> None:
    toy = Toy()
    async with served(application(toy, "onboard")) as server:
        reader, writer = await connect(server)
        writer.write(b"POST /prpc/Bootstrap?json HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab")
        writer.write(b"cdeXX\r\n")
        assert (await read_answer(reader)).status == 400
        assert toy.seen == []
        writer.close()


async def test_a_body_with_a_broken_trailer_is_an_error_and_the_end_of_its_connection(
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked_for = asyncio.Event()

    async def note(asked: Request) -> Request:
        asked_for.set()
        return asked

    async with served(application(Toy(), "guest", context=note)) as server:
        reader, writer = await connect(server)
        writer.write(b"POST /Version?json HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0")
        await asked_for.wait()
        writer.write(b"\r\n?\r\n")
        assert (await read_answer(reader)).error == "failed to read data: the body broke off"
        assert await reader.read() == b""
        writer.close()
    assert not caplog.records


# ---- Clients that others wrote ---------------------------------------------------------------------------


async def test_curl_gets_json_over_a_unix_socket(tmp_path: Path) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    async with served(application(Toy(), "guest"), bind_unix(tmp_path / "dstack.sock")) as server:
        process = await asyncio.create_subprocess_exec(
            *(curl, "-sS", "--fail-with-body", "--unix-socket", server.url.removeprefix("unix:")),
            *("-H", "Content-Type: application/json", "-d", '{"path":"a"}', "http://localhost/GetKey"),
            stdout=subprocess.PIPE,
        )
        out, _ = await process.communicate()
    assert process.returncode == 0
    assert json.loads(out) == {"key": (b"a".ljust(32, b"\x00")).hex(), "signature_chain": ["01", "02"]}


async def test_the_published_python_sdk_gets_its_answers(sock: socket.socket) -> None:
    toy = Toy()
    toy.may_answer.set()
    async with served(application(toy, "guest"), sock) as server:
        client = DstackClient(server.url.removeprefix("unix:"))
        key = await asyncio.to_thread(client.get_key, "a", "signing")
        assert key.decode_key() == b"a".ljust(32, b"\x00")
        assert key.decode_signature_chain() == [b"\x01", b"\x02"]
        quote = await asyncio.to_thread(client.get_quote, b"\x07")
        assert quote.report_data == "07"


# ---- Members that a request's message does not have ------------------------------------------------------


async def test_an_unknown_member_is_ignored_as_upstream_does_and_logged_once_with_the_nearest(
    caplog: pytest.LogCaptureFixture,
) -> None:
    toy = Toy()
    toy.may_answer.set()

    def logged() -> list[str]:
        found = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return found

    async with served(application(toy, "guest")) as server:
        answers = [
            await post(server, "/GetQuote?json", b'{"reportData": "c0ffee", "zz": 1}'),
            await exchange(server, raw("GET", "/GetQuote?reportData=c0ffee&json")),
        ]
        assert [json.loads(answer.body)["report_data"] for answer in answers] == ["", ""]
        first = "unknown member rpc=GetQuote member=reportData did_you_mean=report_data"
        assert logged() == [first, "unknown member rpc=GetQuote member=zz"]
        await exchange(server, raw("GET", "/GetKey?paht=a"))
        assert logged() == ["unknown member rpc=GetKey member=paht did_you_mean=path"]
        many = {f"member{number}" * 100: number for number in range(1000)}
        await post(server, "/GetKey?json", json.dumps(many).encode())
        assert [len(line) for line in logged()] == [len("unknown member rpc=GetKey member=") + 64] * 8
        good = await post(server, "/GetQuote?json", b'{"report_data": "c0ffee"}')
    assert (json.loads(good.body)["report_data"], logged()) == ("c0ffee", [])
