"""The verifier: evidence verified for anybody who asks, over HTTP or for one file, as dstack-verifier does it."""
