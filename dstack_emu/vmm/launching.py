"""What a machine is started with, as its folder has it.

Source of the instance seed's life: dstack `dstack-util/src/system_setup.rs` at 312dc605.
"""

import re
from collections.abc import Callable
from typing import Final

from dstack_emu.vmm.compose_file import key_provider_of
from dstack_emu.vmm.config import CvmSection
from dstack_emu.vmm.errors import VmmError
from dstack_emu.vmm.machine import Launch
from dstack_emu.vmm.manifest import Manifest
from dstack_emu.vmm.store import MachineFolder

Entropy = Callable[[int], bytes]
"""Returns so many random bytes."""
_SEED_SIZE: Final = 20
_SEED: Final = re.compile(f"[0-9a-f]{{{2 * _SEED_SIZE}}}")


def stored_launch(folder: MachineFolder, manifest: Manifest, cvm: CvmSection, entropy: Entropy) -> Launch:
    """Read a machine's folder; raise `VmmError`.

    The instance seed is a new one if there is none yet, or if no key provider keeps the app's disk over a restart. A
    guest reports its seed when it has a disk.
    """
    compose_file = folder.compose_file()
    text = folder.instance_info().get("instance_id_seed", "") if _keeps_disk(compose_file) else ""
    seed = bytes.fromhex(text) if _SEED.fullmatch(text) else None
    return Launch(
        manifest=manifest,
        folder=folder.path,
        compose_file=compose_file,
        user_config=folder.user_config(),
        encrypted_env=folder.encrypted_env(),
        instance_seed=seed or entropy(_SEED_SIZE),
        has_disk=seed is not None,
        kms_urls=manifest.kms_urls or cvm.kms_urls,
        gateway_urls=manifest.gateway_urls or cvm.gateway_urls,
    )


def _keeps_disk(compose_file: str) -> bool:
    try:
        return key_provider_of(compose_file) != "none"
    except VmmError:  # the guest will refuse it
        return True
