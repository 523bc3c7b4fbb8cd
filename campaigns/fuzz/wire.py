"""Targets: what arrives over a socket, the chain's encodings, and configurations."""

import json
import ssl
import struct
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Final

from campaigns.fuzz.target import Target, Tried, selected, table, text_of, wide_text_of
from dstack_emu.attest.errors import AttestError, FormatError
from dstack_emu.auth import contract_abi
from dstack_emu.chain import abi, rlp
from dstack_emu.chain.errors import ChainError, InvalidParamsError, InvalidTransactionError
from dstack_emu.chain.filters import LogFilter
from dstack_emu.chain.quantities import Params, parse_address, parse_data, parse_number, parse_quantity
from dstack_emu.chain.revert import revert_message
from dstack_emu.chain.transaction import Transaction
from dstack_emu.gateway.config import GatewayConfig
from dstack_emu.gateway.ingress.client_hello import ServerNameReader
from dstack_emu.gateway.ingress.dns_message import DnsError, encode_query, parse_answer
from dstack_emu.gateway.ingress.errors import RefusedConnectionError
from dstack_emu.gateway.ingress.label import parse_label
from dstack_emu.gateway.ingress.proxy_header import read_header
from dstack_emu.kms_emu.config import KmsConfig
from dstack_emu.transport.errors import ConfigError
from dstack_emu.transport.failures import AnswerTooLongError, NoAnswerError
from dstack_emu.transport.http.answer import AnswerReader
from dstack_emu.transport.http.connection import IncomingRequest, InvalidRequest, ServerConnection
from dstack_emu.transport.http.origin import RequestTarget
from dstack_emu.transport.settings import merge, overrides, toml_value
from dstack_emu.transport.urls import is_http_url, shown_url, without_credentials
from dstack_emu.verifier.config import VerifierConfig
from dstack_emu.vmm.config import VmmConfig

MAX_BODY: Final = 64 * 1024


def _pieces(data: bytes) -> list[bytes]:
    """Return the rest of an input in pieces, of a size that its first byte says."""
    size, rest = (data[0] or 4096, data[1:]) if data else (1, b"")
    return [rest[at : at + size] for at in range(0, len(rest), size)]


def _request(data: bytes) -> object:
    connection, found = ServerConnection(MAX_BODY), list[IncomingRequest | InvalidRequest]()
    for piece in _pieces(data):
        connection.receive(piece)
        while (request := connection.next_request()) is not None:
            found.append(request)
    connection.receive_eof()
    while (request := connection.next_request()) is not None:
        found.append(request)
    return [
        (each.status, each.reason)
        if isinstance(each, InvalidRequest)
        else (each.method, each.path, each.query, dict(each.headers), each.is_kept_alive)
        for each in found
    ]


_REQUESTS: Final = (
    b"POST /prpc/A?json HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}GET / HTTP/1.0\r\n\r\n",
    b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2;a=b\r\n{}\r\n0\r\nT: u\r\n\r\n",
    b"GET http://a/b?c HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: h2c\r\nExpect: 100-continue\r\n\r\n",
)


def _answer(data: bytes) -> object:
    which, rest = selected(data, 2)
    reader = AnswerReader(MAX_BODY, unpacks=bool(which))
    for piece in _pieces(rest):
        reader.receive(piece)
        if reader.is_complete:
            break
    reader.receive_eof()
    return reader.status, reader.headers, reader.body, reader.is_last


def _answers() -> list[bytes]:
    import gzip

    packed = gzip.compress(b"x" * 100, mtime=0)
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed)
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    plain = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 404 No\r\nConnection: close\r\n\r\nabc"
    return [
        first + second + each
        for first in (b"\0", b"\1")
        for second in (b"\0", b"\7")
        for each in (head + packed, chunked, plain)
    ]


def _hello(data: bytes) -> object:
    reader = ServerNameReader()
    for piece in _pieces(data):
        if (name := reader.receive(piece)) is not None:
            return parse_label(name.partition(".")[0])
    return None


@cache
def _hellos() -> list[bytes]:
    context, found = ssl.create_default_context(), list[bytes]()
    for name in ("00" * 20 + "-8080s.app.example", "a-443g.b", "localhost"):
        coming, going = ssl.MemoryBIO(), ssl.MemoryBIO()
        connection = context.wrap_bio(coming, going, server_hostname=name)
        try:
            connection.do_handshake()
        except ssl.SSLWantReadError:
            hello = going.read()
        found += [bytes([size]) + hello for size in (0, 7)]
    return found


def _proxy(data: bytes) -> object:
    return read_header(data)


_V2: Final = b"\r\n\r\n\0\r\nQUIT\n"
_PROXIES: Final = (
    b"PROXY TCP4 1.2.3.4 5.6.7.8 9 10\r\nrest",
    b"PROXY UNKNOWN\r\n",
    b"PROXY TCP6 ::1 ::2 1 2\r\n",
    _V2 + b"\x21\x11\0\x0c" + bytes(12),
    _V2 + b"\x21\x21\0\x26" + bytes(38),
    _V2 + b"\x20\x00\0\0",
)

_QUERY: Final = encode_query("_dstack-app-address.a.example", 7)


def _dns(data: bytes) -> object:
    tried = Tried((DnsError,))
    tried(lambda: parse_answer(data, _QUERY))
    tried(lambda: encode_query(text_of(data), 1))
    return tried


def _dns_samples() -> list[bytes]:
    head = struct.pack("!HHHHHH", 7, 0x8180, 1, 2, 0, 0) + _QUERY[12:]
    cname = b"\xc0\x0c" + struct.pack("!HHIH", 5, 1, 60, 2) + b"\xc0\x0c"
    txt = b"\xc0\x0c" + struct.pack("!HHIH", 16, 1, 60, 4) + b"\3a:1"
    return [head + cname + txt, b"a.example"]


def _url(data: bytes) -> object:
    tried, text = Tried((NoAnswerError,)), text_of(data)
    tried(lambda: RequestTarget.parse(text))
    return tried, shown_url(text), without_credentials(text), is_http_url(text)


_KINDS: Final = (
    "(bool,string)",
    "(address[],bytes32)",
    "((uint256,bytes,string[])[])",
    "(bytes4,uint8,(bool,bytes)[])",
)


def _abi(data: bytes) -> object:
    which, rest = selected(data, len(_KINDS))
    value = abi.decode(_KINDS[which], rest)
    tried = Tried((FormatError,))
    tried(lambda: abi.encode(_KINDS[which], value))
    return len(repr(value)), tried


def _abi_samples() -> list[bytes]:
    values: list[list[object]] = [
        [True, "text"],
        [[bytes(20), bytes(20)], bytes(32)],
        [[[1, b"x", ["a", "b"]], [2, b"", []]]],
        [b"1234", 7, [[True, b"y"]]],
    ]
    return [bytes([n]) + abi.encode(kind, value) for n, (kind, value) in enumerate(zip(_KINDS, values, strict=True))]


def _contract(data: bytes) -> object:
    tried = Tried((FormatError,))
    tried(lambda: contract_abi.decode_decision(data))
    tried(lambda: contract_abi.decode_text(data))
    tried(lambda: contract_abi.decode_contract_address(data))
    return tried, revert_message(data)


def _contract_samples() -> list[bytes]:
    return [
        abi.encode("(bool,string)", [True, "x" * 40]),
        abi.encode("(string)", ["any"]),
        abi.encode("(address)", [bytes(20)]),
        bytes.fromhex("08c379a0") + abi.encode("(string)", ["no"]),
        bytes.fromhex("4e487b71") + bytes(32),
    ]


def _rlp(data: bytes) -> object:
    item = rlp.decode(data)
    if rlp.encode(item) != data:
        raise AssertionError("another encoding of the same item is accepted")
    return item


def _transactions() -> list[bytes]:
    key = bytes(31) + b"\1"
    found = [Transaction(0, 7, 1, 2, 2, 21000, bytes(20), 1, b"x").signed(key).raw]
    for kind in (1, 2):
        access = ((bytes(20), (bytes(32),)),)
        found.append(Transaction(kind, 7, 1, 2, 2, 21000, None, 1, b"x", access).signed(key).raw)
    return found


def _transaction(data: bytes) -> object:
    found = Transaction.decode(data)
    return found, found.hash


def _rpc_params(data: bytes) -> object:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return "not JSON"
    tried = Tried((InvalidParamsError,))
    for read in (parse_quantity, parse_number, parse_data, parse_address):
        tried(lambda read=read: read(document, "it"))  # type: ignore[misc]
    tried(lambda: LogFilter.of(Params.of(document).members(0, "filter")))
    tried(lambda: Params.of(document).number(0, "it"))
    return tried


_PARAMS: Final = (
    b'[{"address":["0x' + b"00" * 20 + b'"],"topics":[null,["0x' + b"11" * 32 + b'"]]}]',
    b'"0x1f"',
    b'"0x' + b"22" * 20 + b'"',
    b"[7]",
)


def _configuration(name: str, read: Callable[[Path], object], *samples: bytes) -> Target:
    """Make the target of a configuration file of the user."""

    @cache
    def folder() -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="fuzz-")

    def load(data: bytes) -> object:
        file = Path(folder().name) / "it.toml"
        file.write_bytes(data)
        try:
            return repr(read(file))
        except ConfigError as error:
            raise ConfigError(str(error).replace(str(file), "it.toml")) from error

    return Target(name, load, lambda: list(samples), (ConfigError,), weight=0.3, is_of_the_user=True)


def _overrides(data: bytes) -> object:
    variables = dict(line.partition("=")[::2] for line in wide_text_of(data).splitlines())
    return repr(merge({"rpc": {"port": 1}}, overrides(variables, "X_", toml_value)))


_KMS_TOML: Final = b"""[rpc]
address = "127.0.0.1"
port = 8000
[rpc.tls]
key = "/a/rpc.key"
certs = "/a/rpc.crt"
[rpc.tls.mutual]
ca_certs = "/a/tmp-ca.crt"
mandatory = false
[core]
cert_dir = "/a"
admin_token_hash = ""
[core.image]
verify = true
cache_dir = "/a/images"
download_url = "http://127.0.0.1/{OS_IMAGE_HASH}"
download_timeout = "2m"
[core.auth_api]
type = "webhook"
[core.auth_api.webhook]
url = "http://127.0.0.1:3000"
[core.onboard]
enabled = true
auto_bootstrap_domain = ""
address = "127.0.0.1"
port = 8000
"""
_OTHER_TOML: Final = (
    b"""address = "127.0.0.1"
port = 8010
[tls]
key = "a"
certs = "b"
[core]
kms_url = ""
[core.proxy]
listen_port = [8443]
""",
    b"""address = "unix:./vmm.sock"
[cvm]
max_disk_size = 100
[cvm.port_mapping]
enabled = true
range = [{protocol = "tcp", from = 1, to = 2}]
""",
    b"""host = "127.0.0.1"
port = 8080
image_download_timeout_secs = 3
[attestation.urls]
pccs = "http://127.0.0.1"
""",
)

TARGETS: Final = table(
    Target("http-request", _request, lambda: [bytes([n]) + each for n in (0, 1, 9) for each in _REQUESTS], weight=3),
    Target("http-answer", _answer, _answers, (NoAnswerError, AnswerTooLongError), weight=2),
    Target("client-hello", _hello, _hellos, (RefusedConnectionError,), weight=3),
    Target("proxy-header", _proxy, lambda: _PROXIES, (RefusedConnectionError,), weight=2),
    Target("label", lambda data: parse_label(text_of(data)), lambda: [b"app-80s", b"a-1g"], (RefusedConnectionError,)),
    Target("dns", _dns, _dns_samples, (DnsError,), weight=2),
    Target("url", _url, lambda: [b"http://u:p@h.example:80/a?b#c", b"https://[::1%251]/", b"http://\xc3\xbc.example"]),
    Target("abi", _abi, _abi_samples, (FormatError,)),
    Target("contract-answer", _contract, _contract_samples, (FormatError,)),
    Target("rlp", _rlp, lambda: [rlp.encode([b"a", [b"b" * 60, []], b""]), *_transactions()], (FormatError,), weight=2),
    Target("transaction", _transaction, _transactions, (InvalidTransactionError,)),
    Target("rpc-parameters", _rpc_params, lambda: _PARAMS, (ChainError,)),
    _configuration("kms.toml", KmsConfig.load, _KMS_TOML),
    _configuration("gateway.toml", GatewayConfig.load, *_OTHER_TOML),
    _configuration("vmm.toml", VmmConfig.load, *_OTHER_TOML),
    _configuration("verifier.toml", lambda path: VerifierConfig.load(path, {}), *_OTHER_TOML),
    Target("overrides", _overrides, lambda: [b'X_A__B=1\nX_RPC__PORT=[1,2]\nX_C="x"'], (ConfigError, AttestError)),
)
