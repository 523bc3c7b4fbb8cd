"""Journal, spans and fault rules: what watches and disturbs the services of a stack.

No service imports it. It comes in by composition: middleware around applications, headers on requests between services,
wrappers around the verifier and the webhook client.
"""
