"""A program that is given as text, for `tests.processes.forked_by_anyone`: what `python -c` runs, without its start."""

import sys


def main(arguments: list[str]) -> None:
    """Run the text that is the first argument; the others are those of the program."""
    sys.argv = ["-c", *arguments[1:]]
    exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
    sys.exit()
