"""The limits of the ingress. Source of the values: `gateway/gateway.toml` of dstack 312dc605."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Every time limit, in seconds.

    - `proxy_header`, `handshake`, `dns`, `connect`: the steps before anything is forwarded. `handshake` is the limit of
      the ClientHello, and again of the TLS handshake that follows.
    - `idle`: no byte moved in either direction. `write`: a receiver took no byte although `buffer_size` or more waited.
      `shutdown`: both sides had ended, and the last bytes were not taken. None is no limit.
    - `total`: the whole connection, whatever it does.
    """

    proxy_header: float = 5.0
    handshake: float = 5.0
    dns: float = 5.0
    connect: float = 5.0
    idle: float | None = 600.0
    write: float | None = None
    shutdown: float | None = 5.0
    total: float = 18_000.0


@dataclass(frozen=True, slots=True)
class IngressSettings:
    """How the ingress treats connections.

    - `max_connections_per_app` is the limit of connections to all candidates of a name together; 0 is no limit.
    - `buffer_size` is the number of bytes that may wait for a receiver before its sender is no longer read.
    - With `reads_proxy_header` every connection must begin with a PROXY header.
    - With `insecure_localhost_backend` the id `localhost` is this machine's loopback, whose ports are all open.
    """

    timeouts: Timeouts = field(default_factory=Timeouts)
    max_connections_per_app: int = 2000
    buffer_size: int = 65536
    reads_proxy_header: bool = False
    insecure_localhost_backend: bool = False
