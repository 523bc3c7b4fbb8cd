"""Inspection of evidence: identifies an input, describes its contents, and runs every check on it."""
