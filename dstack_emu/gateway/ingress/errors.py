"""Why the ingress ends a connection before it forwards anything.

The client sees the end of its TCP connection and nothing else; the text goes to the log and to the record.
"""


class RefusedConnectionError(Exception):
    """A connection that is not forwarded, with upstream's text where upstream has one."""
