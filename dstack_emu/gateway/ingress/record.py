"""What is known of a connection when it has ended."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

COMPLETE: Final = "complete"
"""How a connection ended whose both directions ended in order."""


@dataclass(slots=True)
class ConnectionRecord:
    """One connection of a client, filled as it goes on.

    - `client` is `host:port`, `server_name` the name in its ClientHello.
    - `id` and `port` are what the label or the TXT record says; `treatment` is `terminated`, `h2`, `passthrough`, or
      empty if that is not known.
    - `app_id` and `instance_id` are of the instance that it reached; `is_forwarded` says whether it reached anything.
    - `received` and `sent` count the bytes from the client to the app, and back; terminated TLS is not counted.
    - `seconds` is how long it lasted; `ended` is `complete`, or the reason why it did not end in order.
    """

    client: str = ""
    server_name: str = ""
    id: str = ""
    port: int = 0
    treatment: str = ""
    app_id: str = ""
    instance_id: str = ""
    is_forwarded: bool = False
    received: int = 0
    sent: int = 0
    seconds: float = 0.0
    ended: str = ""


OnEnd = Callable[[ConnectionRecord], None]
"""Is told of every connection when it has ended."""
