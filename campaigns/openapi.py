"""Hold every OpenAPI document that is served against its server: `python -m campaigns.openapi PROGRAM`.

PROGRAM is `schemathesis`, which draws requests from a document, valid ones and others, and compares the answers: no
status 5xx, none that the document does not have, its content types, and bodies of its schemas. It is installed apart
(`make openapi`), because it brings many packages.

Methods that a document does not have are not compared, but for control: the real programs answer them with 404.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from campaigns.outputs import running, stack

CHECKS: Final = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)


@dataclass(frozen=True)
class Document:
    """A document: its name and its URL; `options` are more of the program's."""

    name: str
    url: str
    options: tuple[str, ...] = ()


@contextmanager
def webhook(kind: str, *arguments: str) -> Iterator[str]:
    """Run a webhook until the block ends; yield its URL."""
    with running("auth", kind, "--listen", "127.0.0.1:0", *arguments) as said:
        yield said["url"]


@contextmanager
def documents(folder: Path) -> Iterator[list[Document]]:
    """Run everything that serves a document; yield the documents."""
    allowlist = folder / "allowlist.json"
    allowlist.write_text("{}")
    with ExitStack() as parts:
        services = parts.enter_context(stack("--vmm", "--auth", "dst=eth", "--state", str(folder / "state")))[
            "services"
        ]
        file = parts.enter_context(webhook("file", "--config", str(allowlist)))
        mock = parts.enter_context(webhook("mock"))
        yield [
            # The stream does not end.
            Document(
                "control",
                f"{services['control']}/openapi.json",
                ("--checks", "unsupported_method", "--exclude-path", "/journal/stream"),
            ),
            Document("vmm", f"{services['vmm']}/api-docs/openapi.json"),
            Document("auth-simple", f"{services['auth-src']}/openapi.json"),
            Document("auth-eth-bun", f"{services['auth-dst']}/openapi.json"),
            Document("dstack-auth", f"{file}/openapi.json"),
            Document("auth-mock", f"{mock}/openapi.json"),
        ]


def held(document: Document, program: str, seed: int, seconds: int, examples: int) -> tuple[int, str]:
    """Run the program with a document; return its status, and what it prints."""
    line = [program, "run", document.url, "--checks", ",".join(CHECKS), "--phases", "coverage,fuzzing"]
    line += ["--seed", str(seed), "--max-time", str(seconds), "--max-examples", str(examples), "--no-color"]
    line += ["--continue-on-failure", "--request-timeout", "60", "--suppress-health-check", "all", *document.options]
    done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.returncode, done.stdout


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all; the status is 1 if an answer is not what its document says."""
    parser = argparse.ArgumentParser(prog="python -m campaigns.openapi", description=__doc__)
    parser.add_argument("program", help="the path of schemathesis")
    parser.add_argument("--seed", type=int, default=1, help="a number, from which the requests are drawn (%(default)s)")
    parser.add_argument("--seconds", type=int, default=120, help="for each document, at most (%(default)s)")
    parser.add_argument("--examples", type=int, default=50, help="requests for each operation (%(default)s)")
    given = parser.parse_args(arguments)
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="openapi-") as folder, documents(Path(folder)) as every:

        def hold(document: Document) -> tuple[int, str]:
            return held(document, given.program, given.seed, given.seconds, given.examples)

        with ThreadPoolExecutor(2) as pool:
            for document, (status, text) in zip(every, pool.map(hold, every), strict=True):
                print(f"== {document.name}: {'as documented' if status == 0 else f'status {status}'}")
                if status:
                    failed.append(document.name)
                    print(text)
    print(f"not as documented: {', '.join(failed) or 'nothing'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
