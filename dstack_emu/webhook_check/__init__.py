"""Check an auth webhook: send every request that a KMS sends, and report the answers that it would not understand."""
