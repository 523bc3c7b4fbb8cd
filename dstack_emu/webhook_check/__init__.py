"""Somebody's own auth webhook, asked everything that a KMS asks, and judged by what the KMS makes of the answers."""
