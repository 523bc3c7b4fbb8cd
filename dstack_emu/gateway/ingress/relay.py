"""Forwards a connection between a client and an app, once both are there.

Each direction ends by itself. A receiver that is slow slows down its sender, so that at most `buffer_size` bytes and
what one read brings wait here. A connection that stands still is aborted: bytes that nobody takes would keep an orderly
close open.
"""

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from typing import cast

from dstack_emu.gateway.ingress.greeting import Greeting
from dstack_emu.gateway.ingress.record import COMPLETE
from dstack_emu.gateway.ingress.settings import IngressSettings
from dstack_emu.gateway.ingress.tls import TlsChannel

_CHECKS = 4
"""How often within a time limit it is looked whether bytes have moved; a connection ends up to a quarter late."""


class End(asyncio.Protocol):
    """One of the two ends of a relay."""

    __slots__ = ("_relay", "has_ended", "is_blocked", "is_lost", "name", "other", "received", "transport")

    transport: asyncio.Transport
    other: "End"

    def __init__(self, relay: "Relay", name: str) -> None:
        self._relay, self.name = relay, name
        self.received = 0
        """How many bytes this end has sent us; over TLS, after decryption."""
        self.has_ended = False
        """Whether this end sends nothing more."""
        self.is_blocked = False
        """Whether this end takes no bytes for now."""
        self.is_lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take a transport over."""
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(self._relay.settings.buffer_size)

    def data_received(self, data: bytes) -> None:
        """Pass data on."""
        self.received += len(data)
        self.other.send(data)

    def eof_received(self) -> bool:
        """Pass on that nothing more comes; the other direction goes on."""
        if not self.has_ended:
            self.has_ended = True
            self.other.send_eof()
            self._relay.ended_one()
        return True

    def send(self, data: bytes) -> None:
        """Send data to this end."""
        self.transport.write(data)

    def send_eof(self) -> None:
        """Tell this end that nothing more comes."""
        if not self.transport.is_closing():
            with contextlib.suppress(OSError):  # it is gone, and its transport tells that, too
                self.transport.write_eof()

    def pause_writing(self) -> None:
        """Let the other end wait."""
        self.is_blocked = True
        self._relay.blocked()
        if not self.other.transport.is_closing():
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        """Let the other end go on."""
        self.is_blocked = False
        if not self.other.transport.is_closing():
            self.other.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        """End the relay."""
        self.is_lost = True
        self._relay.lost(f"{self.name}: {error}" if error else f"{self.name}: the connection is closed")


class TlsEnd(End):
    """The end of a client whose TLS ends here."""

    __slots__ = ("_channel",)

    def __init__(self, relay: "Relay", name: str, channel: TlsChannel) -> None:
        super().__init__(relay, name)
        self._channel = channel

    def data_received(self, data: bytes) -> None:
        """Decrypt data, and pass it on."""
        if self.has_ended:
            return
        try:
            for plain in self._channel.receive(data):
                if plain:
                    super().data_received(plain)
        except ssl.SSLError as error:
            self._relay.abort(f"{self.name}: {error.reason or error}")
            return
        if answer := self._channel.take():
            self.transport.write(answer)
        if self._channel.has_ended:
            super().eof_received()

    def eof_received(self) -> bool:
        """Take the end of the connection for the end of the data."""
        self._channel.receive_eof()
        return super().eof_received()

    def send(self, data: bytes) -> None:
        """Encrypt data, and send it."""
        for encrypted in self._channel.send(data):
            self.transport.write(encrypted)

    def send_eof(self) -> None:
        """Send a close_notify, and then the end."""
        self.transport.write(self._channel.send_eof())
        super().send_eof()


class Relay:
    """The two ends of a forwarded connection, and its time limits; `on_end` is told once how it ended.

    Both ends have a transport before `begin` is called.
    """

    __slots__ = ("_on_end", "_reason", "_shutdown", "_total", "_watches", "_write", "app", "client", "settings")

    def __init__(self, settings: IngressSettings, channel: TlsChannel | None, on_end: Callable[[str], None]) -> None:
        self.settings, self._on_end, self._reason = settings, on_end, ""
        self.client = End(self, "client") if channel is None else TlsEnd(self, "client", channel)
        self.app = End(self, "app")
        self.client.other, self.app.other = self.app, self.client
        limits = settings.timeouts
        self._write = Watch(limits.write, self._blocked_sizes, lambda: self.abort("write timeout"))
        self._shutdown = Watch(limits.shutdown, self._sizes, lambda: self.abort("shutdown timeout"))
        idle = Watch(limits.idle, self._moved, lambda: self.abort("idle timeout"))
        self._watches = (idle, self._write, self._shutdown)
        self._total: asyncio.TimerHandle | None = None

    def begin(self, early: bytes, greeting: Greeting, seconds: float) -> None:
        """Forward what the client has sent early, and its end, and begin to read; the relay may last `seconds`."""
        loop = asyncio.get_running_loop()
        self._total = loop.call_later(seconds, self.abort, "the connection was kept too long")
        self._watches[0].start()
        self.client.data_received(early)
        if greeting.is_lost:
            self.client.connection_lost(None)
        elif greeting.has_ended:
            self.client.eof_received()
        elif not self._is_over():
            self.client.transport.resume_reading()

    def abort(self, reason: str) -> None:
        """End both ends at once."""
        self._reason = self._reason or reason
        self.client.transport.abort()
        self.app.transport.abort()

    def ended_one(self) -> None:
        """Close both ends when both have ended; bytes that wait are still sent."""
        if self._have_both_ended():
            self.client.transport.close()
            self.app.transport.close()
            self._shutdown.start()

    def blocked(self) -> None:
        """Watch an end that takes no more bytes for now."""
        self._write.start()

    def lost(self, reason: str) -> None:
        """Abort the other end if one is lost before both have ended, and end when both are lost."""
        if not self._have_both_ended():
            self.abort(reason)
        if self.client.is_lost and self.app.is_lost:
            self._stop()
            self._on_end(self._reason or COMPLETE)

    def _stop(self) -> None:
        if self._total is not None:
            self._total.cancel()
        for watch in self._watches:
            watch.stop()

    def _have_both_ended(self) -> bool:
        return self.client.has_ended and self.app.has_ended

    def _is_over(self) -> bool:
        return self.client.transport.is_closing() or self.app.transport.is_closing()

    def _sizes(self) -> tuple[int, ...]:
        return tuple(end.transport.get_write_buffer_size() for end in (self.client, self.app))

    def _blocked_sizes(self) -> tuple[int, ...] | None:
        return self._sizes() if self.client.is_blocked or self.app.is_blocked else None

    def _moved(self) -> tuple[int, ...]:
        return self.client.received, self.app.received, *self._sizes()


class Watch:
    """Calls back if a sample stays the same for a time limit; a sample of None ends the watch."""

    __slots__ = ("_expired", "_interval", "_last", "_same", "_sample", "_timer")

    def __init__(
        self, seconds: float | None, sample: Callable[[], tuple[int, ...] | None], expired: Callable[[], None]
    ) -> None:
        self._interval = None if seconds is None else seconds / _CHECKS
        self._sample, self._expired = sample, expired
        self._last: tuple[int, ...] | None = None
        self._same = 0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to watch, unless it is done already or there is no limit."""
        if self._timer is None and self._interval is not None:
            self._last, self._same = self._sample(), 0
            self._arm(self._interval)

    def stop(self) -> None:
        """End the watch."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self, interval: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(interval, self._check, interval)

    def _check(self, interval: float) -> None:
        self._timer = None
        sample = self._sample()
        if sample is None:
            return
        self._same = self._same + 1 if sample == self._last else 0
        self._last = sample
        if self._same >= _CHECKS:
            self._expired()
        else:
            self._arm(interval)
