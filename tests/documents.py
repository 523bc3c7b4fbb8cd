"""Read the documents: their sections, fenced blocks, tables and code spans."""

import os
import re
from dataclasses import dataclass

import pytest

from tests.repository import ROOT

RUN_DOCUMENTS = pytest.mark.skipif(
    "DSTACK_EMU_DOCUMENTS" not in os.environ, reason="DSTACK_EMU_DOCUMENTS is not set: `make documents`"
)
"""Marks a test that runs the commands or programs of a document as its reader does: it takes seconds for each page."""

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PACKAGES = ("auth", "dstack_emu", "kms_emu", "simulator")


def document(name: str) -> str:
    """Return the text of one document."""
    return (ROOT / name).read_text()


def section(text: str, heading: str) -> str:
    """Return the text under a heading, up to the next heading of its level or above."""
    level = len(heading) - len(heading.lstrip("#"))
    inside, rest = False, []
    in_code = False
    for line in text.splitlines():
        in_code ^= line.startswith("```")
        if not in_code and re.match(rf"#{{1,{level}}} ", line):
            inside = line == heading
        elif inside:
            rest.append(line)
    assert rest, f"no text under {heading!r}"
    return "\n".join(rest)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language and its text."""

    language: str
    text: str


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks in order."""
    return [Block(*found) for found in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)]


def prose(text: str) -> str:
    """Return a text without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def rows(text: str, header: str) -> list[list[str]]:
    """Return the cells of each row of the tables whose first column has that header; backticks are kept."""
    found, inside = [], False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("|") else []
        if not cells:
            inside = False
        elif cells[0] == header:
            inside = True
        elif inside and not set(cells[0]) <= {"-"}:
            found.append(cells)
    assert found, f"no table whose first column is {header!r}"
    return found


def code(cell: str) -> list[str]:
    """Return the code spans of a cell."""
    return re.findall(r"`([^`]+)`", cell)
