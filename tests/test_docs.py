"""The documents are complete and true: what they list is what exists, and what they name can be found.

`tests/test_docs_commands.py` runs the commands that they show.
"""

import argparse
import ast
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from dstack_emu.attest.version import EMULATOR
from dstack_emu.cli.main import COMMANDS, parser
from dstack_emu.gateway.config import GatewayConfig
from dstack_emu.kms_emu.api_auth import ADMIN_VARIABLES, ONBOARD_VARIABLES
from dstack_emu.kms_emu.config import VARIABLES, KmsConfig
from dstack_emu.transport.ports import GRPC_PORTS, PORTS
from dstack_emu.verifier.config import VerifierConfig
from dstack_emu.vmm.config import VmmConfig
from tests.commands import run_command
from tests.documents import DOCUMENTS, PACKAGES, code, document, rows, section
from tests.repository import ROOT
from tests.running import RunningStack

# ---- tables


def test_ports_of_the_readme_are_the_stacks() -> None:
    table = rows(section(document("README.md"), "## What runs"), "name")
    assert {code(name)[0]: int(port) for name, port, _ in table} == dict(PORTS)


def test_documented_json_keys_are_those_of_the_line(ready_stack: RunningStack) -> None:
    table = rows(section(document("docs/configuration.md"), "## The line of `up --json`"), "key of the line")
    assert [code(key)[0] for key, _ in table] == list(ready_stack.description)
    assert set(ready_stack.description["app"]) <= set(code({code(key)[0]: what for key, what in table}["app"]))


def test_documented_commands_are_the_programs() -> None:
    text = section(document("docs/configuration.md"), "## Commands")
    assert [code(name)[0] for name, _ in rows(text, "command")] == [f"dstack-emu {name}" for name in COMMANDS]


def test_each_documented_check_names_a_test_that_exists() -> None:
    table = rows(section(document("docs/fidelity.md"), "## What is checked before keys are released"), "by")
    named = [code(row[-1])[0].split("::") for row in table]
    assert len(named) > 25
    for file, name in named:
        assert re.search(rf"def {name}\(", (ROOT / "tests" / file).read_text()), f"{file}::{name}"


def options(command: str) -> set[str]:
    """Return the option strings of a command."""
    (commands,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return options_of(commands.choices[command])


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """Return the option strings of a parser and of its subparsers."""
    found = {option for action in parser._actions for option in action.option_strings}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found = found.union(*map(options_of, action.choices.values()))
    return found


def documented_options(text: str) -> set[str]:
    """Return the option strings that the tables of a text list, without their arguments."""
    if "\n| option |" not in f"\n{text}":
        return set()  # a command without options of its own
    return {span.split()[0] for row in rows(text, "option") for span in code(row[0])}


@pytest.mark.parametrize("command", COMMANDS)
def test_options_of_a_command_are_all_documented_and_no_others(command: str) -> None:
    text = document("docs/configuration.md")
    headings = re.findall(r"^## .*", text, re.MULTILINE)
    of_it = [h for h in headings if h == f"## dstack-emu {command}" or re.search(rf"\(.*\b{command}\b", h)]
    documented = documented_options(section(text, "## Commands"))  # what every command has
    assert documented.union(*(documented_options(section(text, heading)) for heading in of_it)) == options(command)


def test_port_names_are_documented_with_their_defaults() -> None:
    (row,) = (row for row in rows(document("docs/configuration.md"), "option") if row[0] == "`--port NAME=PORT`")
    ports = {**PORTS, **GRPC_PORTS}
    assert re.findall(r"`([\w-]+)` (\d+)", row[-1]) == [(name, str(port)) for name, port in ports.items()]


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of a configuration's keys."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys_of(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def kms_keys() -> list[list[str]]:
    """Return key, default and effect of each row of the table of kms.toml."""
    return rows(section(document("docs/configuration.md"), "## kms.toml"), "key")


def test_keys_of_kms_toml_are_all_documented_and_no_others() -> None:
    assert [code(key)[0] for key, *_ in kms_keys()] == sorted(
        keys_of(KmsConfig), key=[code(key)[0] for key, *_ in kms_keys()].index
    )


def test_documented_defaults_of_kms_toml_are_the_programs() -> None:
    given = [(code(key)[0], code(default)[0]) for key, default, _ in kms_keys() if default != "none"]
    written = KmsConfig.from_document(tomllib.loads("\n".join(f"{key} = {value}" for key, value in given)), "docs")
    assert written == KmsConfig()
    unset = [code(key)[0] for key, default, _ in kms_keys() if default == "none"]
    assert all(key == "default" or key.startswith(("core.attestation.root_ca.", "core.admin.tls.")) for key in unset)


def test_keys_and_defaults_of_dstack_verifier_toml_are_documented() -> None:
    table = rows(section(document("docs/configuration.md"), "## dstack-verifier.toml"), "key")
    assert {code(key)[0] for key, *_ in table} == set(keys_of(VerifierConfig))
    given = [(code(key)[0], code(default)[0]) for key, default, _ in table if default != "none"]
    written = VerifierConfig.model_validate(tomllib.loads("\n".join(f"{key} = {value}" for key, value in given)))
    assert written == VerifierConfig()


def test_keys_and_defaults_of_vmm_toml_are_documented() -> None:
    table = rows(section(document("docs/configuration.md"), "## vmm.toml"), "key")
    assert [code(key)[0] for key, *_ in table] == list(keys_of(VmmConfig))
    given = [(code(key)[0], code(default)[0]) for key, default, _ in table if default != "none"]
    written = VmmConfig.model_validate(tomllib.loads("\n".join(f"{key} = {value}" for key, value in given)))
    assert written == VmmConfig()
    unset = [code(key)[0] for key, default, _ in table if default == "none"]
    assert unset == ["port", "image_path", "cvm.nvidia_attestation_proxy_url", "cvm.tee_simulator"]


CAPABILITIES = {"SYS_ADMIN", "SYS_MODULE", "SYS_RAWIO", "DAC_READ_SEARCH"}


def test_keys_and_defaults_of_gateway_toml_are_documented() -> None:
    table = rows(section(document("docs/configuration.md"), "## gateway.toml"), "key")
    assert [code(key)[0] for key, *_ in table] == list(keys_of(GatewayConfig))
    given = [(code(key)[0], code(default)[0]) for key, default, _ in table if default != "none"]
    written = GatewayConfig.model_validate(tomllib.loads("\n".join(f"{key} = {value}" for key, value in given)))
    assert written == GatewayConfig()


NO_VARIABLES = {"TD_QE", "LEVEL_VARIABLE", "PCCS_URL", *CAPABILITIES}
"""Texts of that form that are not variables: the id in a QE identity, an attribute of a command, a
variable of the apps of a VMM, capabilities of Linux."""


def documented_variables(heading: str) -> set[str]:
    """Return the variables in the tables of one section of the configuration page."""
    table = rows(section(document("docs/configuration.md"), heading), "variable")
    return {variable for names, *_ in table for variable in code(names)}


def test_variables_that_the_code_names_are_documented() -> None:
    named = {
        node.value
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if re.search("environ|ENDPOINT|env:", path.read_text())  # the modules that have to do with an environment
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+", node.value)
    }
    assert {"DSTACK_AGENT_ADDRESS", *ADMIN_VARIABLES, *ONBOARD_VARIABLES} <= named
    assert named - NO_VARIABLES == documented_variables("## Environment variables")


def test_variables_that_set_keys_of_kms_toml_are_documented_as_they_work() -> None:
    text = section(document("docs/configuration.md"), "## kms.toml")
    name, key = re.findall(r"`(\w+__URL)` is `([\w.]+)`", text)[0]
    assert f"`{VARIABLES}`" in text
    assert name == VARIABLES + key.upper().replace(".", "__")
    assert KmsConfig.overrides({name: "x"}) == {"core": {"auth_api": {"webhook": {"url": "x"}}}}


def test_settings_of_the_container_are_documented() -> None:
    used = {
        name
        for file in (
            "docker-compose.yaml",
            "docker-compose.parts.yaml",
            "compose/kms-src.yaml",
            "compose/kms-dst.yaml",
            "compose/vmm.yaml",
            "compose/gateway.yaml",
            "compose/chain.yaml",
        )
        for name in re.findall(r"\$\{(\w+)", document(file))
    }
    assert used == documented_variables("## The containers")


# ---- links and file names


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#]*)#?([^)]*)\)", path.read_text()):
        linked = (path.parent / target).resolve() if target else path
        assert linked.is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", linked.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_named_in_code_spans_exist(path: Path) -> None:
    named = re.findall(rf"`((?:{'|'.join(PACKAGES)}|docs|tests|tools)/[\w./-]*)`", path.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_changelog_has_the_present_version() -> None:
    assert EMULATOR in document("CHANGELOG.md")


# ---- messages

FOREIGN = {
    "InvalidCrlSignatureForPublicKey": "dcap-qvl",
    "QE report hash mismatch": "dcap-qvl",
    "ISV enclave report signature is invalid": "dcap-qvl",
    "Debug mode is enabled": "dcap-qvl",
    "TCBInfo issue date is in the future": "dcap-qvl",
    "Failed to parse root CA CRL": "dcap-qvl",
    "Connection refused": "the operating system",
    "No Python 3.11, 3.12 or 3.13 runs here": "the Makefile",
    "cannot make virtual environments": "the Makefile",
}
"""Parts of messages that come from other programs, and their origin."""

FILLED_IN = {
    "cannot listen on unix:": "cannot listen on {address}",
    "error sending request for url (https://": "the URL",
    "TCB status is not up to date": "TCB status is not {…}",
    "TCB status is not allowed": "TCB status is not {…}",
    "was made with the seed": "was made with the {name}",
    "kms-src": "kms-{side}",
    "kms-src ended": "kms-{side} ended",
    "core.verifi": "the key",
    "returned 404 Not Found": "returned {status}",
    "HTTP 404": "HTTP {status}",
    "failed to read TDX root CA from": "failed to read {what} from",
    "TDX root certificate is not a CA": "{platform} root certificate is not a CA",
    "Request failed with status=400 Bad Request, error=": "status={status}, error={body}",
    "/tcb?fmspc=": "the URL",
    "core.attestation.root_ca.tdx": "{section}attestation.root_ca.tdx",
    "is set, which needs core.attestation.insecure_allow_external_trust_anchors = true": "which needs {section}…",
}
"""Parts of messages that replace an expression in the code's f-string, and that expression."""


def literals() -> str:
    """Return all string literals of the program, one per line; an f-string is several."""
    texts = [
        node.value
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return "\n".join(texts)


def test_messages_of_the_troubleshooting_page_are_the_programs() -> None:
    said = literals()
    # The last section is about clients, and in their words.
    own, _, _ = document("docs/troubleshooting.md").partition("\n## A client cannot connect")
    pieces = {
        piece.strip(" ,")
        for heading in re.findall(r"^##+ (.*)", own, re.MULTILINE)
        for message in code(heading)
        for piece in re.split("…|: |; ", message)
    }
    unknown = {piece for piece in pieces if len(piece) > 2 and piece not in said} - {*FOREIGN, *FILLED_IN}
    assert unknown == set()


def ends(*arguments: str) -> tuple[int, str]:
    """Run a command that fails; return its status and the last line on stderr."""
    done = run_command(*arguments)
    return done.returncode, done.stderr.decode().strip().splitlines()[-1]


def unknown_key(folder: Path) -> list[str]:
    file = folder / "kms.toml"
    file.write_text("[core]\nverifi = 1\n")
    return ["kms", "-c", str(file)]


def no_opt_in(folder: Path) -> list[str]:
    file = folder / "kms.toml"
    file.write_text(f'[core]\ncert_dir = "{folder}"\n[core.attestation.root_ca]\ntdx = "root-ca.pem"\n')
    return ["kms", "-c", str(file)]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (lambda folder: ["up", "--free-ports", "--state", f"{folder}/{'x' * 100}"], 2, "the path is too long"),
        (lambda folder: ["up", "--listen", "192.0.2.1"], 2, "this machine has no such address"),
        (lambda folder: ["up", "--port", "kms=1"], 2, "NAME=PORT expected, with a name of"),
        (lambda folder: ["health", "--state", str(folder)], 1, "no stack is ready in"),
        (unknown_key, 2, "core.verifi: unknown key"),
        (no_opt_in, 2, "which needs core.attestation.insecure_allow_external_trust_anchors = true"),
        (lambda folder: ["quote", "--td15"], 2, "--td15 needs --quote-version 5, got"),
        (lambda folder: ["agent", "--memory", "1G"], 2, "requires memory_size == "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_documented_message_appears(
    arguments: Callable[[Path], list[str]], status: int, message: str, tmp_path: Path
) -> None:
    assert message in document("docs/troubleshooting.md")
    seen = ends(*arguments(tmp_path))
    assert (seen[0], message in seen[1]) == (status, True), seen


def test_documented_message_appears_for_a_port_that_is_taken(ready_stack: RunningStack) -> None:
    port = ready_stack.services["kms-src"].rpartition(":")[2]
    status, message = ends("up", "--free-ports", "--port", f"kms-src={port}")
    assert status == 2
    assert message.endswith(
        f"cannot listen on 127.0.0.1:{port}: the address is in use (set by --port kms-src=PORT; 0 takes a free one)"
    )
