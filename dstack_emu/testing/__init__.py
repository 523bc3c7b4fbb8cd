"""A stack for tests: `LiveStack` and its parts, plain synchronous calls, and `refused`. docs/pytest.md describes them.

The fixtures of `pytest_plugin` are made of this; it needs no pytest itself.
"""

from dstack_emu.testing.kms import Kms, Policy
from dstack_emu.testing.live import LiveStack
from dstack_emu.testing.observation import ActiveFault, Clock, Journal
from dstack_emu.testing.refusals import Refusal, Refused, refused
from dstack_emu.testing.trust_domain import Image, Platform, TrustDomain, Vendor

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
