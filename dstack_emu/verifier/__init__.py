"""The verifier: evidence verified for any client over HTTP, or for one file, as dstack-verifier does it."""
