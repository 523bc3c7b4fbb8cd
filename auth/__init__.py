"""The webhooks that decide for a KMS: auth-simple and dstack-auth (by a file), and auth-mock.

Three layers. Pure: `boot_info`, `policy` (auth-simple's rules) and `allowlist` (dstack-auth's). Services: `simple`,
`file` and `mock`, which read what decides. HTTP: `server` and `file_server`.
"""
