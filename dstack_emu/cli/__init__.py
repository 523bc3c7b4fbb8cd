"""The command line `dstack-emu`. No other package imports it."""
