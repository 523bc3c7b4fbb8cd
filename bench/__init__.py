"""Measurements of the emulator: `make bench`, or `python -m bench`.

One module for each subject, with a function that makes figures of an `Effort`. What has a reference is measured side by
side with it in the same run, in alternating rounds, and the median counts: on a machine that does other things too, a
quotient says more than an absolute number. Nothing here is a test: a missed bar is printed, not raised.
"""
