"""Inspection of evidence: what some bytes are, what they contain, and which checks they pass."""
