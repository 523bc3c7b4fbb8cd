"""`python -m dstack_emu` is `dstack-emu`."""

from dstack_emu.cli.main import main

main()
