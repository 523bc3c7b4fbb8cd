"""The fake Intel platform: the only holder of Intel-like private keys.

Root and platforms grow from one seed; trust domains boot on them and answer through a guest agent; a PCCS serves the
collateral with which a verifier accepts their quotes. It protects nothing: whoever knows the seed has every key.
"""
