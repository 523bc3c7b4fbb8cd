""".sys-config.json: what the host tells a guest of its surroundings, written at each start of a machine.

Source: dstack `vmm/src/app.rs` (make_sys_config) at 312dc605.
"""

import json
from typing import Any, Final

from dstack_emu.attest.release import Release
from dstack_emu.vmm.config import VmmConfig
from dstack_emu.vmm.machine import GuestConfig, Launch

HOST_API_URL: Final = "vsock://2:10000/api"


def sys_config(config: VmmConfig, launch: Launch, guest: GuestConfig, release: Release) -> bytes:
    """Return the file of one machine."""
    cvm = config.cvm
    document: dict[str, Any] = {
        "kms_urls": list(launch.kms_urls),
        "gateway_urls": list(launch.gateway_urls),
        "pccs_url": cvm.pccs_url,
        "docker_registry": cvm.docker_registry,
        "host_api_url": HOST_API_URL,
        "vm_config": guest.vm_config,
    }
    if release.vmm_tells_collateral_urls:
        document["collateral_urls"] = {"pccs": cvm.pccs_url}
    if guest.mr_config is not None:
        document["mr_config"] = guest.mr_config
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
