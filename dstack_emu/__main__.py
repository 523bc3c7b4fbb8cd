"""`python -m dstack_emu` is `dstack-emu`."""

from dstack_emu.cli.entry import main

main()
