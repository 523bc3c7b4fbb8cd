#!/opt/venv/bin/python -IS
"""The health check of one service: a program of one file, for containers, that starts fast.

    healthcheck http://127.0.0.1:8081/health      that URL must answer with status 200
    healthcheck kms:127.0.0.1:9301                a KMS, which uses TLS only when it has keys
    healthcheck stack:/var/lib/dstack-emu         a stack, by its state folder: it must be ready

A container runs it every few seconds, so it imports nothing of the project, and no HTTP library. Certificates are not
verified: only the status matters here.
"""

import socket
import sys
import time
from typing import Final

TIMEOUT: Final = 5.0
"""Seconds for a whole request."""
MAX_HEAD: Final = 4096


def check(target: str) -> str:
    """Request a URL or `kms:host:port`; return the problem, empty if the answer is 200.

    A stack is `stack:folder`. Raises `ValueError` if the target has none of these forms.
    """
    if target.startswith("stack:"):
        return _check_stack(target.removeprefix("stack:"))
    if target.startswith("kms:"):
        address = target.removeprefix("kms:")
        return _check_url(f"http://{address}/health", "200", "401") and check(f"https://{address}/health")
    return _check_url(target, "200")


def _check_url(target: str, *expected: str) -> str:
    """Request a URL; an onboard phase that wants a token of every caller answers 401."""
    scheme, separator, rest = target.partition("://")
    host, path = rest.partition("/")[::2]
    name, colon, port = host.rpartition(":")
    if scheme not in ("http", "https") or not separator or not colon or not name or not port.isdecimal():
        raise ValueError(f"http(s)://host:port/path expected, got {target!r}")
    try:
        status = _get((name.strip("[]"), int(port)), f"/{path}", secure=scheme == "https")
    except (OSError, OverflowError) as error:
        return f"{target}: {error}"
    return "" if status in expected else f"{target} answered {status or 'no HTTP'}, 200 expected"


def _check_stack(folder: str) -> str:
    """Request the control API of a stack: when a part of it fails, the whole stack ends."""
    import json  # only needed here

    try:
        with open(f"{folder}/stack.json", encoding="utf-8") as file:
            url = str(json.load(file)["services"]["control"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"no stack is ready in {folder}: {error}"
    return check(f"{url}/health")


def _get(address: tuple[str, int], path: str, *, secure: bool) -> str:
    """GET a page; return the status in the first line of the answer, empty if it is not HTTP."""
    until = time.monotonic() + TIMEOUT
    with socket.create_connection(address, TIMEOUT) as plain:
        stream: socket.socket = plain
        if secure:
            import ssl  # slow to import, and only needed for https

            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            stream = context.wrap_socket(plain)
        stream.sendall(f"GET {path} HTTP/1.1\r\nHost: {address[0]}\r\nConnection: close\r\n\r\n".encode())
        head = b""
        while b"\r\n" not in head and len(head) < MAX_HEAD:
            stream.settimeout(max(until - time.monotonic(), 0.001))  # a server may send a byte at a time
            chunk = stream.recv(MAX_HEAD)
            if not chunk:
                break
            head += chunk
    words = head.split(b" ", 2)
    return words[1].decode(errors="replace") if len(words) == 3 and words[0].startswith(b"HTTP/") else ""


if __name__ == "__main__":
    found = [problem for target in sys.argv[1:] if (problem := check(target))]
    print("\n".join(found) or "ready")
    sys.exit(bool(found))
