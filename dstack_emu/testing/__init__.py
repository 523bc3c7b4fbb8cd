"""A stack for tests: `LiveStack` and its parts, with synchronous calls, and `refused`. docs/pytest.md describes them.

The fixtures of `pytest_plugin` return these classes. This package does not need pytest.
"""

from dstack_emu.testing.chain import LiveChain
from dstack_emu.testing.clock import LiveClock
from dstack_emu.testing.faults import LiveFault
from dstack_emu.testing.gateway import LiveGateway
from dstack_emu.testing.journal import LiveJournal
from dstack_emu.testing.kms import LiveKms, LivePolicy
from dstack_emu.testing.live_stack import LiveStack
from dstack_emu.testing.platforms import LiveImage, LivePlatform, LiveVendor
from dstack_emu.testing.refusals import Refusal, Refused, refused
from dstack_emu.testing.trust_domains import LiveTrustDomain

__all__ = [
    "LiveChain",
    "LiveClock",
    "LiveFault",
    "LiveGateway",
    "LiveImage",
    "LiveJournal",
    "LiveKms",
    "LivePlatform",
    "LivePolicy",
    "LiveStack",
    "LiveTrustDomain",
    "LiveVendor",
    "Refusal",
    "Refused",
    "refused",
]
