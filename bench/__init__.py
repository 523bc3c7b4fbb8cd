"""Measurements of the emulator: `make bench`, or `python -m bench`.

One module for each subject, each a function from an `Effort` to figures. Everything is measured side by side with a
reference in the same run, in alternating rounds, and the median counts: a machine that others use too says little by
its absolute numbers. Nothing here is a test; a missed bar is printed, not raised.
"""
