"""The KMS: it creates root keys or onboards them from another KMS, and releases keys if an auth webhook allows that.

It never imports `simulator`: a KMS that shared code with the maker of the evidence would prove nothing.
"""
