"""Composition: the whole emulated deployment in one process.

The lowest room that knows both what makes evidence (`simulator`) and what verifies it (`kms_emu`).
"""
