"""Every recipe of docs/recipes.md runs unchanged, with the fixtures of the plugin.

They are run if DSTACK_EMU_DOCUMENTS is set (`make documents`).
"""

import re
from pathlib import Path

from tests.documents import RUN_DOCUMENTS, blocks, document, section
from tests.scratch import run_pytest, write

PAGE = document("docs/recipes.md")
HEADINGS = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)


@RUN_DOCUMENTS
def test_recipes_run_unchanged(tmp_path: Path) -> None:
    assert len(HEADINGS) == 12
    files = {}
    for number, heading in enumerate(HEADINGS):
        (code,) = (block.text for block in blocks(section(PAGE, f"## {heading}")))
        files[f"test_{number}.py"] = code
    write(tmp_path, files)
    tests = [name for code in files.values() for name in re.findall(r"^def (test_\w+)", code, re.MULTILINE)]
    done = run_pytest(tmp_path, "-v")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [name for name in tests if f"::{name}" not in done.stdout] == []
    assert "skipped" not in done.stdout
