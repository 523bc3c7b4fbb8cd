"""The commands of `dstack-emu`, one module each.

A module says how it is called (`HELP`, `DESCRIPTION`, `add_arguments`) and runs (`run`, which returns the exit status
and raises the errors that `cli.main` turns into one line). Shared pieces are in `cli.commands.common`.
"""
