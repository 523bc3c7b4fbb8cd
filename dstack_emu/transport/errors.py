"""The errors of connections and configurations, in a module that imports no HTTP library."""

from dstack_emu.transport.urls import shown_url


class TransportError(Exception):
    """A call got no usable answer: the text has the URL, without user and password, and the cause."""

    def __init__(self, url: str, cause: str) -> None:
        url = shown_url(url)
        super().__init__(f"error sending request for url ({url}): {cause}")
        self.url = url
        self.cause = cause


class ListenError(Exception):
    """A server cannot listen on an address: the text has the address, the cause, and the setting if it is known."""

    def __init__(self, address: str, cause: str, setting: str = "") -> None:
        super().__init__(f"cannot listen on {address}: {cause}" + (f" (set by {setting})" if setting else ""))
        self.address = address
        self.cause = cause
        self.setting = setting


class ConfigError(Exception):
    """A configuration is invalid: the text names the file or variable, and the key."""
