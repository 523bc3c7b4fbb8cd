"""What is done to a running stack: its parts and their state, as Python calls and over HTTP."""
