"""What the machines of one host share, and the trust domain that a machine is started as."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from dstack_emu.attest.app_compose import AppManifest
from dstack_emu.attest.app_requirements import Requirements
from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.image.memory import HIGH_MEMORY, LOW_MEMORY
from dstack_emu.attest.release import Release
from dstack_emu.attest.vmconfig import VmConfig
from dstack_emu.deployment.clock import StackClock
from dstack_emu.deployment.reach import InstanceReach
from dstack_emu.deployment.workloads import Workloads
from dstack_emu.simulator.errors import GuestError
from dstack_emu.simulator.image import OsImage
from dstack_emu.simulator.image_files import load_image
from dstack_emu.simulator.intel import Intel
from dstack_emu.simulator.seed import Seed
from dstack_emu.simulator.trust_domain import AppCompose, TrustDomain
from dstack_emu.transport.pccs_client import AttestationVerifier
from dstack_emu.vmm.errors import VmmError
from dstack_emu.vmm.machine import Launch

MEGABYTE: Final = 1024**2

BOOTS_AT_ONCE: Final = 32
"""So many machines at most fetch their keys at once. Of a thousand that start together, each would hold what its boot
needs until nearly all are done, and wait so long for each answer that its calls come close to their timeouts."""


@dataclass(frozen=True, slots=True)
class MachineSite:
    """What the machines of one host share.

    `verifier` verifies the evidence of a KMS, `issued_at` is the time for certificates in Unix seconds, `images` the
    folder of OS images, `own_image` the one that exists without a folder, and `workloads` makes what runs beside the
    agents. With `writes_environment` an app's decrypted environment is in files of its machine's folder while it runs.
    `clock` says when a machine registers at its gateway again; its gateway finds the ports of machines in `reach`.
    `boots` is held by a machine from its power-on until it has its keys.
    """

    intel: Intel
    seed: Seed
    release: Release
    images: Path
    own_image: OsImage
    verifier: AttestationVerifier
    issued_at: Callable[[], int]
    workloads: Workloads
    clock: StackClock
    reach: InstanceReach
    writes_environment: bool = True
    headers: Callable[[str], Callable[[], Mapping[str, str]]] | None = None
    boots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(BOOTS_AT_ONCE))

    def image(self, name: str) -> OsImage:
        """Return the OS image of that name; raise `VmmError` if there is none."""
        folder = self.images / name
        if not folder.exists() and name == self.own_image_name:
            return self.own_image
        try:
            return load_image(folder)
        except FormatError as error:
            raise VmmError(f"Failed to load image: {error}") from error

    @property
    def own_image_name(self) -> str:
        """The name of the image that exists without a folder."""
        return f"{self.own_image.name}-{self.own_image.version}"

    def vm_config(self, launch: Launch) -> VmConfig:
        """Return the configuration that a machine is measured with; raise `VmmError`."""
        manifest, image = launch.manifest, self.image(launch.manifest.image)
        config = image.vm_config(
            max(manifest.vcpu, 1),
            measured_memory(manifest.memory * MEGABYTE, image),
            num_nics=len(manifest.networks) or 1,
            hugepages=manifest.hugepages,
            swtpm=manifest.swtpm,
        )
        try:
            variant = attestation_variant(AppManifest.parse(launch.compose_file, self.release).requirements)
        except FormatError as error:
            raise VmmError(f"Failed to read compose file: {error}") from error
        volumes = len(manifest.volumes)
        return replace(config, image=manifest.image, num_verity_volumes=volumes, tdx_attestation_variant=variant)

    def power_on(self, launch: Launch) -> TrustDomain:
        """Return the trust domain of a machine; raise `VmmError`, or an error of the guest."""
        try:
            app_id = bytes.fromhex(launch.manifest.app_id)
        except ValueError as error:
            raise GuestError(f"app id: hex expected, got {launch.manifest.app_id!r:.60}") from error
        return TrustDomain(
            self.intel.platform("host of the VMM"),
            self.image(launch.manifest.image),
            AppCompose(launch.compose_file),
            instance_seed=launch.instance_seed,
            vm_config=self.vm_config(launch),
            app_id=app_id,
            user_config=launch.user_config or None,
            release=self.release,
        )


def attestation_variant(requirements: Requirements | None) -> Literal["legacy", "lite"]:
    """Return the TDX variant of a machine: what its app requires, lite if it requires nothing."""
    return "legacy" if requirements is not None and requirements.tdx_measure_acpi_tables else "lite"


def measured_memory(asked: int, image: OsImage) -> int:
    """Return the size of the memory in bytes: 2 GiB if the lite variant does not know the size that was asked for.

    It knows every size for an image whose firmware normalizes the kernel's header.

    Upstream has the legacy variant then, whose images a KMS downloads.
    """
    known = asked == LOW_MEMORY or asked >= HIGH_MEMORY or (asked > 0 and image.measurement.kernel_header_normalized)
    return asked if known else LOW_MEMORY
