"""Port policies as messages. Source: dstack `gateway/src/{admin,main}_service.rs` at 312dc605 and 40eaf35e."""

from collections.abc import Iterable
from typing import Final

from dstack_emu.attest.proto import gateway_pb2 as pb
from dstack_emu.gateway.errors import GatewayError
from dstack_emu.gateway.state import InstanceEntry, PolicyEntry

MAX_PORT: Final = 65535


def reported_policy(message: pb.PortPolicy, *, refuses_ports: bool) -> PolicyEntry:
    """Read the policy in a registration; raise `GatewayError` for a wrong port, or leave out those above 65535."""
    ports = message.ports
    if refuses_ports:
        for each in ports:
            _require_port(each)
            if each.port == 0:
                raise GatewayError("port must be between 1 and 65535")
    return _entry((each for each in ports if each.port <= MAX_PORT), message)


def admin_policy(message: pb.PortPolicy) -> PolicyEntry:
    """Read the policy of an operator, which may name port 0; raise `GatewayError` for a port above 65535."""
    for each in message.ports:
        _require_port(each)
    return _entry(message.ports, message)


def _entry(ports: Iterable[pb.PortAttrs], message: pb.PortPolicy) -> PolicyEntry:
    return PolicyEntry(ports={each.port: each.pp for each in ports}, restrict_mode=message.restrict_mode)


def _require_port(attributes: pb.PortAttrs) -> None:
    if attributes.port > MAX_PORT:
        raise GatewayError(f"port {attributes.port} out of u16 range: out of range integral type conversion attempted")


def policy_message(entry: PolicyEntry | None) -> pb.PortPolicy | None:
    """Return a policy as a message, its ports in order."""
    if entry is None:
        return None
    ports = [pb.PortAttrs(port=port, pp=pp) for port, pp in sorted(entry.ports.items())]
    return pb.PortPolicy(ports=ports, restrict_mode=entry.restrict_mode)


def policy_view(entry: InstanceEntry) -> pb.GetInstancePortPolicyResponse:
    """Return both policies of an instance, and which of them is in force."""
    source = "admin" if entry.override is not None else "instance" if entry.reported is not None else "none"
    return pb.GetInstancePortPolicyResponse(
        effective=policy_message(entry.effective),
        source=source,
        instance_reported=policy_message(entry.reported),
        admin_override=policy_message(entry.override),
    )
