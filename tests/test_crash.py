"""A KMS that is killed while it stores its keys: the next start finds all of them, or none and nothing else.

Here at every step of the storing alone; the campaign `crash` does it to whole servers, too, at random moments.
"""

import json
import os
import subprocess
import sys
import tempfile

from tests.repository import ROOT

MEMORY = "/dev/shm"


def test_crash_at_any_step_of_storing_leaves_all_keys_or_none() -> None:
    # In memory where there is some: what is flushed to a disk, hundreds of times, proves nothing more.
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as folder:
        run = [sys.executable, "-m", "tests.crashing_store", folder]
        done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    store, replace, overwrite = found["store"], found["replace"], found["overwrite"]
    assert store["with keys"] + store["without keys"] == store["crashes"] + 1
    assert replace["old"] + replace["new"] == replace["crashes"] + 1
    assert overwrite["old"] + overwrite["new"] == overwrite["crashes"] + 1
    assert min(overwrite["old"], overwrite["new"]) >= 5
    assert min(store["with keys"], store["without keys"], replace["old"], replace["new"]) >= 5
    assert store["crashes"] > 100
    assert store["crashes of the next start"] > 100
