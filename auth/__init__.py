"""The webhooks a KMS asks before it releases keys: auth-simple (a config file decides) and auth-mock.

Three layers: `boot_info` and `policy` are pure, `simple` and `mock` are the services, `server` is their one
HTTP front.
"""
