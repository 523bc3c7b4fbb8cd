"""What `make scale` measures with: slopes, and pictures and tables that the same data gives again to the byte."""

import json
import resource
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from bench.scale.__main__ import DATA, PAGE, PICTURES, SUBJECTS, faster_than_the_size
from bench.scale.chart import draw
from bench.scale.growth import Effort, Quantity, Series, Subject, from_json, medians, slope, to_json
from bench.scale.page import run_of, table_of, with_tables
from tests.repository import ROOT

TOTAL = Quantity("cpu", "Time", "s", is_counted=True)
RATE = Quantity("calls", "Calls", "calls per CPU s", kind="each")
SVG = "{http://www.w3.org/2000/svg}"


def series(power: float, *, before: float = 0.5) -> Series:
    """Return a total that grows with a power of the size, and a rate whose calls take that much longer."""
    return {
        size: {"cpu": before + 0.1 * size**power if size else before, "calls": 1000 / size**power if size else 1000.0}
        for size in (0, 1, 2, 4, 8, 16, 32, 64)
    }


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_slope_is_the_power_with_which_something_grows(power: float) -> None:
    grown = from_json(to_json(series(power)))
    assert slope(grown, TOTAL) == pytest.approx(power, abs=1e-3)
    assert slope(grown, RATE) == pytest.approx(power, abs=1e-3)


def test_slope_of_too_few_sizes_is_unknown() -> None:
    assert slope({size: {"cpu": 1.0} for size in (1, 2, 4, 8, 16)}, TOTAL) is None


def test_each_value_is_the_median_of_the_rounds_that_reached_its_size() -> None:
    assert medians([{1: {"cpu": 3.0}, 2: {"cpu": 9.0}}, {1: {"cpu": 1.0}}, {1: {"cpu": 2.0}}]) == {
        1: {"cpu": 2.0},
        2: {"cpu": 9.0},
    }


@pytest.mark.parametrize(("power", "faults"), [(1.0, 0), (2.0, 1)])
def test_count_that_grows_with_the_square_is_a_fault(power: float, faults: int) -> None:
    subject = Subject("some", "Some", "some", 64, 64, (TOTAL, RATE), lambda _: iter(()))
    found = faster_than_the_size(subject, series(power))
    assert len(found) == faults
    assert all(fault.startswith("some: Time: ") for fault in found)


def test_sizes_double_up_to_the_largest() -> None:
    assert Effort(1024, 0.1).sizes() == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    assert Effort(1000, 0.1).sizes() == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000]
    assert Effort(1, 0.1).sizes() == [1]


def test_pictures_and_tables_are_those_of_the_data() -> None:
    data = json.loads(DATA.read_text())
    assert data["subjects"].keys() == SUBJECTS.keys()
    tables = {"run": run_of(data)}
    for name, each in data["subjects"].items():
        found = from_json(each["points"])
        assert (PICTURES / f"scale-{name}.svg").read_text() == draw(SUBJECTS[name], found)
        tables[name] = table_of(SUBJECTS[name], found)
    assert PAGE.read_text() == with_tables(PAGE.read_text(), tables)


@pytest.mark.parametrize("name", SUBJECTS)
def test_picture_says_in_words_what_it_shows(name: str) -> None:
    picture = ElementTree.fromstring((PICTURES / f"scale-{name}.svg").read_text())
    title, description = (picture.findtext(SVG + tag) or "" for tag in ("title", "desc"))
    assert (picture.get("role"), picture.get("aria-labelledby")) == ("img", "title description")
    assert title == SUBJECTS[name].title
    assert all(f"{quantity.title}, {quantity.unit}: " in description for quantity in SUBJECTS[name].quantities)
    assert "prefers-color-scheme: dark" in (picture.findtext(SVG + "style") or "")


def test_page_without_a_place_for_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="one place for the table kms expected, got 0"):
        with_tables("# Scale\n", {"kms": "| a |\n"})


def test_up_raises_its_limit_of_open_files() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    script = (
        f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, {hard}))\n"
        "from dstack_emu.cli.main import main\n"
        "try: main(['up', '--listen', 'no such host', '--free-ports'])\n"
        "except SystemExit: pass\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == str(hard)
