"""A chain for authorization: an embedded EVM with the contracts that dstack's operators deploy, and its JSON-RPC."""
