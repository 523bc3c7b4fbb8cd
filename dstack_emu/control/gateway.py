"""The calls of the control API about the gateway of a stack."""

from typing import TYPE_CHECKING, Any

from dstack_emu.control.kms import KmsControl
from dstack_emu.control.schemas import ControlError, TxtRecord, checked, unknown
from dstack_emu.deployment.description import app_url
from dstack_emu.gateway.errors import GatewayError

if TYPE_CHECKING:
    from dstack_emu.gateway.gateway import Gateway


class GatewayControl(KmsControl):
    """The calls about the gateway. They raise `ControlError` if they are refused."""

    def gateway(self) -> dict[str, Any]:
        """Return how apps are reached, and which instances are registered; times are Unix seconds.

        Without a gateway, nobody is, and there are no addresses.
        """
        running = self._deployment.gateway
        found = None if running is None else running.find()
        addresses = self._deployment.description().get("gateway", {})
        records = {} if running is None else dict(running.txt_records)
        return {**addresses, "instances": {} if found is None else self._instances(found), "txt_records": records}

    def set_txt_record(self, name: str, value: str) -> dict[str, str]:
        """Let a domain name have a TXT record, such as `_dstack-app-address.www.example` with `<app id>:443`."""
        records = self._txt_records()
        records[name.lower()] = checked(TxtRecord, {"value": value}).value
        return dict(records)

    def delete_txt_record(self, name: str) -> None:
        """Take away the TXT record of a domain name."""
        records = self._txt_records()
        if records.pop(name.lower(), None) is None:
            raise unknown("TXT record", name, list(records) or ["there is none"])

    def _txt_records(self) -> dict[str, str]:
        if self._deployment.gateway is None:
            raise ControlError("the stack has no gateway: start it with --gateway", 404)
        return self._deployment.gateway.txt_records

    def end_handshake(self, instance_id: str) -> dict[str, Any]:
        """Let the gateway have heard nothing of an instance, as of one that is gone, until it registers again."""
        gateway = self._running_gateway()
        known = gateway.records.instances
        if instance_id not in known:
            raise unknown("registered instance", instance_id, list(known) or ["none is registered"])
        try:
            gateway.registry.end_handshake(instance_id)
        except GatewayError as error:
            raise ControlError(str(error)) from error
        return self.gateway()

    def _running_gateway(self) -> "Gateway":
        running = self._deployment.gateway
        if running is None:
            raise ControlError("the stack has no gateway: start it with --gateway", 404)
        found = running.find()
        if found is None:
            raise ControlError("the gateway has no keys yet: boot its trust domain, gateway", 409)
        return found

    def _instances(self, gateway: "Gateway") -> dict[str, dict[str, Any]]:
        return {
            instance_id: {
                "app_id": entry.app_id,
                "app_url": app_url(self._deployment.context, instance_id),
                "ip": entry.ip,
                "registered_at": entry.registered_at,
                "handshake_at": entry.handshake_at,
                "connections": gateway.connections.of(instance_id),
            }
            for instance_id, entry in gateway.records.instances.items()
        }
