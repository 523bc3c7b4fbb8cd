"""The control API: observes and changes a running stack, as Python calls and over HTTP."""
