"""Observability of a stack: the journal, its spans, and fault rules.

No service imports this package. `deployment` adds it from outside: as middleware around applications, as headers on
requests between services, and as wrappers around the verifier and the webhook client.
"""
