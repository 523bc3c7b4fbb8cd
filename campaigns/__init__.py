"""Campaigns: many random cases from a seed against the emulator, with a report of what was tried and found.

`python -m campaigns NAME --seed S --cases N` runs one; docs/assurance.md lists them. No part of the wheel.
"""
