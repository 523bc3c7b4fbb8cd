"""The webhooks a KMS asks before it releases keys: auth-simple and dstack-auth (a file decides), and auth-mock.

Three layers. Pure: `boot_info`, `policy` (auth-simple's rules) and `allowlist` (dstack-auth's). Services: `simple`,
`file` and `mock`, which read what decides. HTTP: `server` and `file_server`.
"""
