"""The emulated Intel platform: the only package with Intel-like private keys.

Root and platforms are derived from one seed. Trust domains boot on the platforms and answer through a guest agent. A
PCCS serves the collateral with which a verifier accepts their quotes. It protects nothing: everyone who knows the seed
has every key.
"""
