"""The gateway of a dstack deployment: registration of instances, and an ingress that finds them by the TLS server name.

It is a stranger to the other services: where an instance listens is told by whoever runs it (`routing.Reach`).
"""
