"""The dstack attestation protocol as pure functions over bytes: quotes, event logs, evidence, certificates, keys,
codecs.

Nothing here opens a socket, reads a clock, an environment variable or a file: time, keys and bytes come in as
arguments. The forger of evidence (`simulator`) and its verifiers (`kms_emu`, `verifier`) build on this package, and
vectors recorded from real hardware keep it honest.
"""
