"""Composition: the whole emulated deployment in one process.

The only room that knows both who makes evidence (`simulator`) and who verifies it (`kms_emu`).
"""
