"""How time, memory and speed grow with the number of trust domains, CVMs, KMS, apps and stacks: `make scale`."""
