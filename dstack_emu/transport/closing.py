"""Closes a stream's transport whose protocol may have paused reading."""

import asyncio


def close(transport: asyncio.Transport) -> None:
    """Close a transport after its pending bytes are sent; do nothing if that has begun.

    asyncio's transport of TLS that meets the client's end of file while reading is paused waits until reading is
    resumed, and ignores `close`: its socket would stay in CLOSE_WAIT for ever. Therefore reading is resumed here; the
    protocol has to bear that it is given data once more.
    """
    if not transport.is_closing():
        transport.resume_reading()
        transport.close()
