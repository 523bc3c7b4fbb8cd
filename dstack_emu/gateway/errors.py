"""What the gateway refuses. The text of an error goes to the caller."""

from dstack_emu.transport.errors import ConfigError


class GatewayError(Exception):
    """A call that is refused, with upstream's text where upstream has one."""


class GatewayConfigError(GatewayError, ConfigError):
    """A configuration that the gateway does not start with; the text names the key."""
