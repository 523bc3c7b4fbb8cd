"""The command line `dstack-emu`. Nothing below it imports it."""
