"""What can go wrong with a connection, apart from the code that makes one: who only catches needs no HTTP library."""


class TransportError(Exception):
    """A call that got no usable answer: which URL, and why."""

    def __init__(self, url: str, cause: str) -> None:
        super().__init__(f"error sending request for url ({url}): {cause}")
        self.url = url
        self.cause = cause


class ListenError(Exception):
    """An address that cannot be listened on: which, why, and the setting that names it where one is known."""

    def __init__(self, address: str, cause: str, setting: str = "") -> None:
        super().__init__(f"cannot listen on {address}: {cause}" + (f" (set by {setting})" if setting else ""))
        self.address = address
        self.cause = cause
        self.setting = setting


class ConfigError(Exception):
    """A configuration that cannot be used; the text names the file or variable, and the key."""
