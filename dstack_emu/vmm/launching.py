"""What a machine is started with, as its folder has it."""

import re
from collections.abc import Callable
from typing import Final

from dstack_emu.vmm.config import CvmSection
from dstack_emu.vmm.machine import Launch
from dstack_emu.vmm.manifest import Manifest
from dstack_emu.vmm.store import MachineFolder

Entropy = Callable[[int], bytes]
"""Returns so many random bytes."""
_SEED_SIZE: Final = 20
_SEED: Final = re.compile(f"[0-9a-f]{{{2 * _SEED_SIZE}}}")


def stored_launch(folder: MachineFolder, manifest: Manifest, cvm: CvmSection, entropy: Entropy) -> Launch:
    """Read a machine's folder; its instance seed is random if it has none. Raises `VmmError`."""
    seed = folder.instance_info().get("instance_id_seed", "")
    return Launch(
        manifest=manifest,
        folder=folder.path,
        compose_file=folder.compose_file(),
        user_config=folder.user_config(),
        encrypted_env=folder.encrypted_env(),
        instance_seed=bytes.fromhex(seed) if _SEED.fullmatch(seed) else entropy(_SEED_SIZE),
        kms_urls=manifest.kms_urls or cvm.kms_urls,
        gateway_urls=manifest.gateway_urls or cvm.gateway_urls,
    )
