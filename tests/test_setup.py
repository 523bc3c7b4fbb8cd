"""`dstack-emu setup` and `health`: a stack that runs elsewhere, by its public interfaces alone."""

import http.server
import json
import threading
import urllib.request
from pathlib import Path
from typing import ClassVar

import pytest

from tests import tls
from tests.commands import run_command, usage_error
from tests.running import RunningStack, running_stack


def arguments(stack: RunningStack) -> list[str]:
    """What names the services of a stack."""
    urls = stack.services
    policies = str(stack.policies["src"].parent)
    return ["--kms-src", urls["kms-src"], "--kms-dst", urls["kms-dst"], "--app", urls["app"], "--policies", policies]


def test_ready_stack_is_left_as_it_is(ready_stack: RunningStack) -> None:
    before = {side: path.read_bytes() for side, path in ready_stack.policies.items()}
    done = run_command("setup", *arguments(ready_stack), "--json")
    assert (done.returncode, json.loads(done.stdout)["fresh"]) == (0, False), done
    assert done.stderr.decode().splitlines() == ["waiting for the app's keys"]
    assert {side: path.read_bytes() for side, path in ready_stack.policies.items()} == before


def test_kms_that_is_denied_is_said_in_its_own_words(fresh_stack: RunningStack) -> None:
    fresh_stack.policies["src"].write_text('{"osImages": []}')
    done = run_command("setup", *arguments(fresh_stack))
    assert done.returncode == 2
    assert done.stderr.decode().splitlines()[-1] == (
        "Error: kms-src: Bootstrap: KMS is not allowed to bootstrap: boot denied: OS image is not allowed"
    )
    # The other policy was the placeholder, this one a person's own.
    assert json.loads(fresh_stack.policies["src"].read_text()) == {"osImages": []}
    assert json.loads(fresh_stack.policies["dst"].read_text())["osImages"]


def test_policies_of_another_stack_are_refused_at_once(
    ready_stack: RunningStack, fresh_stack: RunningStack, tmp_path: Path
) -> None:
    # KMS with keys do not say what they measure; a policy of another OS image is recognized by the app alone.
    for stack in (ready_stack, fresh_stack):
        for path in stack.policies.values():
            policy = json.loads(ready_stack.policies["src"].read_text())
            (tmp_path / path.name).write_text(json.dumps({**policy, "osImages": ["0x" + "ab" * 32]}))
        done = run_command("setup", *arguments(stack)[:-1], str(tmp_path))
        assert done.returncode == 2
        said = (
            f"auth-src.json was written for another seed, release or OS image: osImages lists 0x{'ab' * 32}, but not "
        )
        assert said in done.stderr.decode().splitlines()[-1]


def test_fresh_setup_only_places_policies_that_deny(fresh_stack: RunningStack, tmp_path: Path) -> None:
    words = [*arguments(fresh_stack)[:-1], str(tmp_path / "new"), "--fresh"]
    assert run_command("setup", *words).returncode == 0
    written = json.loads((tmp_path / "new" / "auth-dst.json").read_text())
    assert (written["osImages"], written["kms"]["mrAggregated"]) == ([], [])
    assert run_command("health", "--kms", fresh_stack.services["kms-src"].partition("://")[2]).stdout == b"ready\n"


def test_kms_that_is_set_up_has_the_host_of_its_url_in_its_certificate() -> None:
    with running_stack("--fresh") as stack:
        words = arguments(stack)
        del words[4:6]  # the app of a fresh stack asks for no keys
        assert run_command("setup", *words).returncode == 0
        for name in ("kms-src", "kms-dst"):
            ca = json.loads(stack.curl(f"https://{stack.services[name][7:]}/prpc/KMS.GetMeta?json")[1])["ca_cert"]
            with urllib.request.urlopen(f"https://{stack.services[name][7:]}/health", context=tls.client(ca)) as answer:
                assert answer.status == 200
        assert run_command("health", "--kms", stack.services["kms-dst"].partition("://")[2]).returncode == 0


@pytest.mark.parametrize("option", ["--url", "--kms"])
def test_service_that_does_not_answer_is_named(option: str) -> None:
    address = "http://127.0.0.1:1/health" if option == "--url" else "127.0.0.1:1"
    done = run_command("health", option, address)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.endswith(b"127.0.0.1:1/health: [Errno 111] Connection refused\n")


def test_health_of_nothing_and_of_no_url_is_refused() -> None:
    nothing = "nothing to check: give --state DIR, --url URL or --kms HOST:PORT, or set DSTACK_EMU_STATE"
    assert usage_error("health", environment={"DSTACK_EMU_STATE": ""}) == nothing
    assert usage_error("health", "--url", "ftp://x") == "http(s)://host:port/path expected, got 'ftp://x'"


def test_health_finds_the_stack_by_the_folder_in_the_environment(ready_stack: RunningStack) -> None:
    done = run_command("health", environment={"DSTACK_EMU_STATE": ready_stack.description["state"]})
    assert (done.returncode, done.stdout) == (0, b"ready\n"), done.stderr


class _Starting(http.server.BaseHTTPRequestHandler):
    """A service that is ready at the third request."""

    statuses: ClassVar[list[int]] = [200, 503, 503]

    def do_GET(self) -> None:
        self.send_response(self.statuses.pop())
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def test_health_that_waits_repeats_the_check_until_all_answer() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), _Starting) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        done = run_command("health", "--url", f"http://127.0.0.1:{server.server_port}/health", "--wait", "60")
        server.shutdown()
    assert (done.returncode, done.stdout, done.stderr) == (0, b"ready\n", b"")
    assert _Starting.statuses == []


def test_health_that_has_waited_says_once_what_does_not_answer() -> None:
    done = run_command("health", "--url", "http://127.0.0.1:1/health", "--wait", "0.3")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == b"http://127.0.0.1:1/health: [Errno 111] Connection refused\n"
    assert usage_error("health", "--url", "http://x:1/", "--wait", "soon") == (
        "argument --wait: seconds, 0 to 86400, expected, got 'soon' (see dstack-emu health --help)"
    )


def test_setup_where_nothing_answers_says_who(tmp_path: Path) -> None:
    words = ["--kms-src", "http://127.0.0.1:1", "--kms-dst", "http://127.0.0.1:1", "--app", "http://127.0.0.1:1"]
    done = run_command("setup", *words, "--policies", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == b"Error: kms-src at http://127.0.0.1:1: Connection refused\n"
