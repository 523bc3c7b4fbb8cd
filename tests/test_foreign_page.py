"""What a page in a browser of this machine can make listeners do: each refuses what a browser sends for it.

The headers are those of the standards Fetch and Fetch Metadata; `make browser` has a browser send them.
"""

import pytest

from dstack_emu.transport.http.foreign_page import foreign_page
from tests.running import RunningStack

LOOPBACK = ("127.0.0.1", 8085)
BROWSER = {"User-Agent": "Mozilla/5.0 (X11; Linux x86_64; rv:145.0) Gecko/20100101 Firefox/145.0"}
OTHERS = {
    "a page of another site": {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
    "a page of another port": {"Sec-Fetch-Site": "same-site", "Origin": "http://127.0.0.1:3000"},
    "a form of another site": {"Origin": "https://evil.example"},
    "a page without an origin": {"Origin": "null"},
    "a name that leads here": BROWSER | {"Host": "rebound.attacker.com:8085"},
}


@pytest.mark.parametrize("headers", OTHERS.values(), ids=OTHERS)
def test_every_listener_refuses_a_page_of_others(ready_stack: RunningStack, headers: dict[str, str]) -> None:
    sent = [word for name, value in headers.items() for word in ("-H", f"{name}: {value}")]
    services = {name: url for name, url in ready_stack.services.items() if name not in ("control", "chain")}
    assert len(services) > 8
    for name, url in services.items():
        if url.startswith("https:") and "Host" in headers:
            continue  # no certificate has the name
        assert ready_stack.curl(f"{url}/health", *sent)[0] == 403, name


@pytest.mark.parametrize(
    ("request_line", "headers"),
    [
        ("GET /finish", {}),
        ("GET /finish", BROWSER | {"Sec-Fetch-Site": "none", "Sec-Fetch-Dest": "document", "Host": "localhost:8085"}),
        ("GET /", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}),
        ("POST /prpc/StopVm", {"Sec-Fetch-Site": "same-origin", "Origin": "http://LOCALHOST:1", "Host": "localhost:1"}),
        ("POST /", {"Host": "vmm.corp.example.com"}),  # a program, through a name of /etc/hosts
        ("POST /", {"Host": "vmm.corp.example.com", "User-Agent": "python-requests/2.32.5", "Accept": "*/*"}),
        ("POST /", {"Sec-Fetch-Mode": "cors", "Accept-Language": "*", "Host": "127.0.0.1:1"}),  # fetch of Node
        *(("GET /", BROWSER | {"Host": host}) for host in ("[::1]:8085", "stack:8085", "kms.example.test", "10.0.2.2")),
    ],
)
def test_programs_and_own_pages_and_links_are_not_refused(request_line: str, headers: dict[str, str]) -> None:
    method, path = request_line.split()
    assert foreign_page(method, path, headers, LOOPBACK, is_secure=False) == ""


@pytest.mark.parametrize(
    ("request_line", "headers"),
    [
        ("GET /finish", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}),
        ("POST /", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}),
        ("GET /", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}),
        ("GET /", {"Origin": "http://localhost.evil.com:1", "Host": "localhost:1"}),
        *(
            ("GET /", BROWSER | {"Host": host})
            for host in ("evil.com", "127.0.0.1.evil.com:1", "[", "a.local", "x.lan")
        ),
        ("GET /", {"User-Agent": "curl/8", "Accept-Language": "en", "Host": "evil.com"}),  # changed by a page
    ],
)
def test_what_a_page_of_others_could_send_is_refused(request_line: str, headers: dict[str, str]) -> None:
    method, path = request_line.split()
    assert foreign_page(method, path, headers, LOOPBACK, is_secure=False) != ""


@pytest.mark.parametrize(
    ("address", "is_secure"), [(("192.0.2.7", 1), False), ("/run/x.sock", False), (LOOPBACK, True)]
)
def test_names_are_judged_on_loopback_without_tls_alone(address: object, is_secure: bool) -> None:
    headers = BROWSER | {"Host": "kms.corp.example.com"}
    assert foreign_page("GET", "/", headers, address, is_secure=is_secure) == ""
