"""The verifier: verifies evidence for any client over HTTP, or in one file, as dstack-verifier does."""
