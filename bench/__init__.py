"""Benchmarks of the emulator: `make bench`, or `python -m bench`.

Each module has one subject, and a function that returns figures for an `Effort`. A subject that has a reference is
measured beside it in the same run, in alternating rounds, and the median is used: on a machine with other load, a ratio
is more reliable than an absolute number. A missed bar is printed, not raised: these are not tests.
"""
