"""Check an auth webhook: the answers that a KMS would not understand, and what it allows that it should deny."""
