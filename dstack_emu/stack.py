"""The public class `Stack`: a deployment, and the control API that observes and changes it, with its console.

async with Stack(StackConfig(seed="mine")) as stack:
    print(stack.services["kms-src"])
    stack.control.deny("src", "app")
"""

from dstack_emu.console.pages import add_pages, is_public
from dstack_emu.control.api import Control
from dstack_emu.control.server import ControlService, Pages
from dstack_emu.deployment.authorization import Progress
from dstack_emu.deployment.config import StackConfig
from dstack_emu.deployment.deployment import Deployment, log
from dstack_emu.deployment.vmm import VmmExtension


class Stack(Deployment):
    """A deployment with the control API: in Python as `control`, over HTTP as the service `control`."""

    def __init__(self, config: StackConfig | None = None, progress: Progress = log.info) -> None:
        super().__init__(config, progress)
        self.control = Control(self)
        self._control_service = ControlService(self.control, self, Pages(add_pages, is_public))
        self.extend(self._control_service)
        if self.config.gateway:
            from dstack_emu.deployment.gateway import GatewayExtension  # few stacks need it, and it costs time

            self.extend(GatewayExtension(self))
        if self.config.vmm:
            self.extend(VmmExtension(self))

    @property
    def control_token(self) -> str | None:
        """The token that the control API demands over HTTP, None if none; known once the stack is entered."""
        return self._control_service.token
