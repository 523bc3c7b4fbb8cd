"""Check a KMS: put to any KMS, over its public interfaces, what it must refuse, and what it must release after that."""
