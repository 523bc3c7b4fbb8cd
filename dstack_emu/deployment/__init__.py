"""Composition of the whole emulated deployment in one process.

It is the lowest package that imports both `simulator`, which makes evidence, and `kms_emu`, which verifies it.
"""
