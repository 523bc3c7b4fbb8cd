"""Composition: the whole emulated deployment in one process, and the command line.

The only package that knows both who forges (`simulator`) and who judges (`kms_emu`, `auth`).
"""
