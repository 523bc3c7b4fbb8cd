"""The VMM: deploys machines (CVMs), keeps their state on disk, and answers dstack's VMM RPCs.

How a machine runs is an interface (`vmm.machine`) that the caller implements. Imports `attest` and `transport` alone.
"""
