"""Writes the tables of docs/scale.md, each between two comments that name its subject."""

import re
from typing import Any

from bench.scale.chart import number
from bench.scale.growth import Series, Subject, slope


def with_tables(page: str, tables: dict[str, str]) -> str:
    """Return a page with these tables in it, by name; raise `ValueError` if it has no place for one."""
    for name, table in tables.items():
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        page, found = place.subn(lambda match, table=table: f"{match[1]}{table}{match[2]}", page)  # type: ignore[misc]
        if found != 1:
            raise ValueError(f"docs/scale.md: one place for the table {name} expected, got {found}")
    return page


def table_of(subject: Subject, series: Series) -> str:
    """Return the values of a subject by size, and the slope of each quantity."""
    heads = [subject.axis, *(f"{each.title} ({each.unit})" for each in subject.quantities)]
    rows = [
        [f"{size:,}", *(number(values[each.key]) if each.key in values else "" for each in subject.quantities)]
        for size, values in series.items()
    ]
    slopes = [slope(series, each) for each in subject.quantities]
    rows.append(["slope", *("" if each is None else f"{each + 0.0:.2f}" for each in slopes)])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [heads, ["---:"] * len(heads), *rows])


def run_of(data: dict[str, Any]) -> str:
    """Return in a table when, where and with what the values were measured."""
    rows = [("date", data["date"]), ("machine", data["machine"]), ("versions", data["versions"])]
    for name, each in data["subjects"].items():
        rows.append((name, f"rounds: {each['rounds']}; load of the machine: {each['load']}"))
    return "| what | measured |\n| --- | --- |\n" + "".join(f"| {name} | {value} |\n" for name, value in rows)
