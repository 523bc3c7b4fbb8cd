"""web3.py, imported when a test needs it: that takes a second.

It imports py_ecc, which lets the whole process recurse 100,000 frames deep, more than the stack holds in C code.
"""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from web3 import Web3


def connect(url: str) -> "Web3":
    """Return a client of the chain at a URL."""
    limit = sys.getrecursionlimit()
    from web3 import HTTPProvider, Web3

    sys.setrecursionlimit(limit)
    return Web3(HTTPProvider(url))


def send(client: "Web3", method: str, *params: Any) -> Any:
    """Send a request; return the whole answer."""
    from web3.types import RPCEndpoint

    return client.provider.make_request(RPCEndpoint(method), list(params))
