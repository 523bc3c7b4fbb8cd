"""The webhooks that decide for a KMS: auth-simple and dstack-auth by a file, auth-eth-bun by a chain, and auth-mock.

Three layers. Pure: `boot_info`, `policy` (auth-simple's rules), `allowlist` (dstack-auth's), and `contract_abi`,
`contract_rules` and `eth_request` (a contract's bytes, reasons and arguments). Services: `simple`, `file`, `eth` and
`mock`, which read or ask what decides; `json_rpc` is the client of a chain. HTTP: `server`, `eth_server` and
`file_server`; `hono` is the front of the first two.
"""
