"""The KMS: it bootstraps or onboards root keys, and releases keys to whom an auth webhook allows them.

It never imports `simulator`: a KMS that shared the forger's code would prove nothing.
"""
