"""gRPC under bad weather: long texts, large messages, deadlines, cancelled calls, streams that nobody finishes."""

import itertools
import os
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import foreign
from tests.commands import serving
from tests.http2 import DATA, END_HEADERS, HEADERS, PREFACE, SETTINGS, frame, header_block
from tests.reflected import reflected
from tests.running import RunningStack, running_stack
from tests.test_grpc_kms import kms_process
from tests.transports import INVALID, WRONG_PHASE

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def stack() -> Iterator[RunningStack]:
    """A ready stack with gRPC, in one process."""
    with running_stack("--grpc") as running:
        yield running


# ---- texts and messages


SAID = ("unsupported algorithm `", "`, use `secp256k1` or `ed25519`")
"""What GetKey of the guest API v1 says before and after the name that it does not know."""


@pytest.mark.parametrize("name", ["short", "a\nb\tc", "100 % größer: ✓ 𝄞", "\x00\x7f"])
def test_text_of_any_kind_arrives_as_it_is(repeating_agent: str, name: str) -> None:
    with reflected(repeating_agent) as client:
        refusal = client.call("dstack.guest.v1.DstackGuest/GetKey", algorithm=name)
    assert (refusal.code, refusal.text) == (INVALID, name.join(SAID))


@pytest.mark.parametrize("letter", ["x", "ü", "✓", "\n"])
def test_text_too_long_for_a_status_is_cut_and_says_so(repeating_agent: str, letter: str) -> None:
    with reflected(repeating_agent) as client:
        refusal = client.call("dstack.guest.v1.DstackGuest/GetKey", algorithm=letter * 100_000)
    assert refusal.code == INVALID
    head, found, tail = refusal.text.partition("…")
    assert found
    assert head.removeprefix(SAID[0]).strip(letter) == ""
    size = len("".join(SAID)) + 100_000 * len(letter.encode())
    assert tail == f" ({size} bytes, cut)"


@pytest.fixture(scope="module")
def repeating_agent() -> Iterator[str]:
    """An agent that repeats what it refuses, which only the guest API v1 does."""
    with serving("agent", "--release", "0.6", "--grpc", "127.0.0.1:0") as agent:
        yield agent["grpc_target"]


def test_message_of_ten_mib_is_the_longest(stack: RunningStack) -> None:
    root_ca = Path(stack.description["kms_ca"]).read_text()
    with reflected(stack.description["grpc"]["kms-src-grpc"], root_ca) as client:
        method = "kms.KMS/GetAppEnvEncryptPubKey"
        envelope = 1 + 4  # the field's tag and its length
        longest = client.call(method, app_id="00" * (10 * MIB - envelope))
        assert (longest.code, longest.text) == (INVALID, "app_id must be 20 bytes")
        too_long = client.call(method, app_id="00" * (10 * MIB - envelope + 1))
        assert too_long.code == "RESOURCE_EXHAUSTED"
        assert client.call("kms.KMS/GetMeta").value


# ---- deadlines and cancellation


class Silent:
    """A webhook that listens and never answers; it notes when a question is put, and when it is given up."""

    def __init__(self) -> None:
        self.asked, self.given_up = threading.Semaphore(0), threading.Semaphore(0)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._listen, daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._hear, args=(connection,), daemon=True).start()

    def _hear(self, connection: socket.socket) -> None:
        with connection:
            while data := connection.recv(65536):
                if b"\r\n\r\n" in data:
                    self.asked.release()
        self.given_up.release()


def test_work_stops_with_the_call(ready_stack: RunningStack, tmp_path: Path) -> None:
    webhook = Silent()
    try:
        with kms_process(tmp_path, ready_stack, webhook=webhook.url) as (kms, _), reflected(kms.grpc_target) as client:
            late = client.call("kms.Onboard/Bootstrap", domain="kms.test", timeout=3)  # the webhook is asked before
            assert late.code == "DEADLINE_EXCEEDED"
            assert webhook.asked.acquire(timeout=foreign.TIMEOUT)
            assert webhook.given_up.acquire(timeout=foreign.TIMEOUT)
            bootstrap = client.channel.unary_unary("/kms.Onboard/Bootstrap")
            for _ in range(3):  # each gets the lock that the one before it held
                call = bootstrap.future(b"\x0a\x08kms.test", timeout=foreign.TIMEOUT)
                assert webhook.asked.acquire(timeout=foreign.TIMEOUT)
                call.cancel()
                assert webhook.given_up.acquire(timeout=foreign.TIMEOUT)
            assert not list((tmp_path / "certs").iterdir())
    finally:
        webhook.close()


def test_keys_are_stored_whole_or_not_at_all_whenever_the_call_ends(ready_stack: RunningStack, tmp_path: Path) -> None:
    with kms_process(tmp_path, ready_stack) as (kms, _), reflected(kms.grpc_target) as client:
        assert client.call("kms.Onboard/GetAttestationInfo").value
        certs = tmp_path / "certs"
        for attempt in itertools.count(1):  # a little longer each time, and more so where the machine is slow
            limit = 0.0005 * attempt * (1 + attempt / 100)
            outcome = client.call("kms.Onboard/Bootstrap", domain="kms.test", timeout=limit)
            if outcome.code != "DEADLINE_EXCEEDED":
                break
            assert client.call("kms.Onboard/GetAttestationInfo").value  # what was begun is over now
            assert len(list(certs.iterdir())) in (0, 9)
        assert outcome.code in ("OK", WRONG_PHASE)
        again = client.call("kms.Onboard/Bootstrap", domain="kms.test")
        assert (again.code, again.text) == (WRONG_PHASE, "KMS has already been bootstrapped")
        assert len(list(certs.iterdir())) == 9


# ---- floods


def half_open(target: str, streams: int) -> ssl.SSLSocket:
    """Open a connection with so many calls, each with a message of 10 MiB announced and hardly begun."""
    host, _, port = target.partition(":")
    context = foreign.tls_context(None, None)
    context.set_alpn_protocols(["h2"])
    plain = socket.create_connection((host, int(port)), timeout=foreign.TIMEOUT)
    connection = context.wrap_socket(plain, server_hostname=host)
    frames = [PREFACE, frame(SETTINGS, 0, b"")]
    for number in range(streams):
        stream = 2 * number + 1
        frames.append(frame(HEADERS, stream, header_block("/kms.KMS/GetAppKey"), END_HEADERS))
        frames.append(frame(DATA, stream, b"\0" + struct.pack(">I", 10 * MIB) + bytes(100)))
    connection.sendall(b"".join(frames))
    return connection


class Process:
    """A process as the system sees it."""

    def __init__(self, pid: int) -> None:
        self._folder = Path(f"/proc/{pid}")

    def memory(self) -> int:
        """Bytes that it holds."""
        return int((self._folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def files(self) -> int:
        """How many files and sockets it has open."""
        return len(os.listdir(self._folder / "fd"))


def flood_with_streams(target: str, root_ca: str) -> None:
    connections = [half_open(target, 100) for _ in range(20)]
    with reflected(target, root_ca) as client:
        for _ in range(20):
            assert client.call("kms.KMS/GetTempCaCert").value
    for connection in connections:
        connection.close()


def flood_with_messages(target: str, root_ca: str) -> None:
    with reflected(target, root_ca) as client:
        call = client.channel.unary_unary("/kms.KMS/GetAppKey")
        body = bytes(12 * MIB)
        for refused in [call.future(body, timeout=foreign.TIMEOUT) for _ in range(8)]:
            assert refused.exception().code().name == "RESOURCE_EXHAUSTED"
        assert client.call("kms.KMS/GetTempCaCert").value


def flood_with_cancelled_calls(target: str, root_ca: str) -> None:
    with reflected(target, root_ca) as client:
        call = client.channel.unary_unary("/kms.KMS/GetTempCaCert")
        for _ in range(20):
            for pending in [call.future(b"", timeout=foreign.TIMEOUT) for _ in range(50)]:
                pending.cancel()
    with reflected(target, root_ca) as client:  # who floods may see his own next calls refused
        assert client.call("kms.KMS/GetTempCaCert").value


@pytest.mark.parametrize("flood", [flood_with_streams, flood_with_messages, flood_with_cancelled_calls])
def test_kms_goes_on_serving_in_a_flood_and_gives_its_memory_back(
    stack: RunningStack, flood: Callable[[str, str], None]
) -> None:
    target, root_ca = stack.description["grpc"]["kms-src-grpc"], Path(stack.description["kms_ca"]).read_text()
    process = Process(stack.process.pid)

    def settled(files: int = 0) -> tuple[int, int]:
        """Ask until what was closed before is gone: at least 30 times, and up to 1,000 while more files are open."""
        with reflected(target, root_ca) as client:
            for turn in range(1000):
                assert client.call("kms.KMS/GetMeta").value
                if turn >= 30 and (not files or process.files() <= files):
                    break
            return process.memory(), process.files()

    flood(target, root_ca)  # pools and caches have their size then
    memory, files = settled()
    for _ in range(3):
        flood(target, root_ca)
    memory_after, files_after = settled(files + 2)
    assert memory_after - memory < 64 * MIB
    assert files_after <= files + 2
    assert stack.rpc("kms-src", "KMS.GetTempCaCert")[0] == 200
