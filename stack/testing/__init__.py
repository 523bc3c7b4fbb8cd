"""A stack for tests: `LiveStack` and its parts, plain synchronous calls, and `refused`. docs/pytest.md describes them.

The fixtures of `stack.pytest_plugin` are made of this; it needs no pytest itself.
"""

from stack.testing.kms import Kms, Policy
from stack.testing.live import LiveStack
from stack.testing.observing import ActiveFault, Clock, Journal
from stack.testing.refusals import Refusal, Refused, refused
from stack.testing.trust_domain import Image, Platform, TrustDomain, Vendor

__all__ = [
    "ActiveFault",
    "Clock",
    "Image",
    "Journal",
    "Kms",
    "LiveStack",
    "Platform",
    "Policy",
    "Refusal",
    "Refused",
    "TrustDomain",
    "Vendor",
    "refused",
]
