"""The public names: docs/api.md lists them all, they are there, and importing the package alone costs nothing."""

import inspect
import subprocess
import sys
from dataclasses import fields

import grimp

import dstack_emu
from dstack_emu import Stack, StackConfig, testing
from tests.documents import code, document, rows, section
from tests.own_stack import own_stack
from tests.repository import ROOT

PAGE = document("docs/api.md")


def listed(heading: str, header: str) -> set[str]:
    """Return the names in the first column of the tables with that header under a heading."""
    return {code(row[0])[0] for row in rows(section(PAGE, heading), header)}


def test_page_lists_the_names_of_both_packages() -> None:
    assert listed("## `dstack_emu`", "name") == set(dstack_emu.__all__)
    assert listed("## `dstack_emu.testing`", "name") == set(testing.__all__)


def test_each_listed_name_can_be_imported() -> None:
    assert {name: inspect.isclass(getattr(dstack_emu, name)) for name in dstack_emu.__all__} == dict.fromkeys(
        dstack_emu.__all__, True
    )
    assert all(callable(getattr(testing, name)) for name in testing.__all__)


def test_page_lists_every_field_of_the_settings() -> None:
    assert listed("## `dstack_emu`", "field") == {field.name for field in fields(StackConfig)}


async def test_running_stack_has_the_attributes_that_the_page_lists() -> None:
    async with own_stack(fresh=True) as stack:
        for name in listed("## `dstack_emu`", "attribute"):
            assert hasattr(stack, name.removesuffix("()"))
        assert isinstance(stack, Stack)


def test_importing_the_package_imports_nothing_else_of_it() -> None:
    program = "import sys, dstack_emu; print([m for m in sys.modules if m.startswith('dstack_emu.')])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# ---- what an import of a public name loads

STACK_ALONE = {
    "dstack_emu.control",
    "dstack_emu.deployment.deployment",
    "dstack_emu.kms_emu",
    "dstack_emu.observability",
    "dstack_emu.stack",
    "dstack_emu.verifier",
}
"""What only a whole stack needs, among all that one guest on its own could import."""


def test_guest_on_its_own_imports_no_part_of_a_stack() -> None:
    graph = grimp.build_graph("dstack_emu", cache_dir=None)
    needed = graph.find_upstream_modules("dstack_emu.deployment.standalone_guest")
    packages = {name for name in STACK_ALONE if any(f"{m}.".startswith(f"{name}.") for m in needed)}
    assert packages == set()


def test_agent_command_starts_without_the_libraries_that_it_does_not_need() -> None:
    program = "import sys; from dstack_emu.cli.commands import agent; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"aiohttp", "dcap_qvl", "grpc", "pydantic"} & set(done.stdout.split())
