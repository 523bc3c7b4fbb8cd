"""The ingress of the gateway: it forwards each TLS connection to the instance that the server name means."""
