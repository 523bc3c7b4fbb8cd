"""`python -m stack` is `dstack-emu`."""

from stack.cli import main

main()
