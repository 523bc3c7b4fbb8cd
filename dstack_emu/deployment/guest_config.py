"""The settings of one emulated guest, and the boot of its trust domain.

`dstack-emu agent`, `boot` and `quote` use this module. It starts no server. The trust domains of a stack are described
by `deployment.specs`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dstack_emu.attest.app_compose import AppManifest
from dstack_emu.attest.release import DEFAULT, Release
from dstack_emu.attest.vmconfig import VmConfig
from dstack_emu.simulator.guest_files import KeyFile
from dstack_emu.simulator.image import OsImage
from dstack_emu.simulator.image_files import load_image
from dstack_emu.simulator.intel import Intel
from dstack_emu.simulator.platform import PlatformState
from dstack_emu.simulator.seed import DEFAULT_SEED, Seed
from dstack_emu.simulator.trust_domain import AppCompose, DomainSettings, KeyProvider, TrustDomain
from dstack_emu.simulator.vendor_state import VendorState

DEFAULT_NAME = "app"


@dataclass(frozen=True, slots=True)
class VirtualMachine:
    """The VM: its OS image, CPUs, and memory in bytes.

    An image has the version of the guest's release unless another is given. `directory`, an image on disk, takes
    precedence over the image's name and version; `config`, a whole vm_config text that carries a measurement document,
    over everything else.
    """

    image: str = "dstack-emu"
    version: str | None = None
    cpu_count: int = 2
    memory_size: int = 2 * 1024**3
    config: str | None = None
    directory: Path | None = None


@dataclass(frozen=True, slots=True)
class KmsBoot:
    """The KMS that a guest tries in order (`https://host:port`), and for how many seconds all of them may be
    unreachable.

    With `keeps_asking` it listens at once, without keys, and repeats its request until it gets them, whatever the
    refusal.
    """

    urls: tuple[str, ...]
    patience: float = 0.0
    keeps_asking: bool = False


@dataclass(frozen=True, slots=True)
class GuestConfig:
    """Settings of one emulated guest. Its keys are those of `kms`, else of `key_file`, else its own.
    `key_provider` is the provider that a guest with keys of its own names; `release` is the dstack release of the
    guest. `user_config` is the text of the app's own file, `encrypted_env` the bytes of its encrypted environment.
    """

    seed: str = DEFAULT_SEED
    platform: str = f"host of {DEFAULT_NAME}"
    compose: AppCompose = field(default_factory=lambda: AppCompose.named(DEFAULT_NAME))
    app_id: bytes | None = None
    instance: str = ""
    machine: VirtualMachine = field(default_factory=VirtualMachine)
    settings: DomainSettings = field(default_factory=DomainSettings)
    platform_state: PlatformState = field(default_factory=PlatformState)
    vendor_state: VendorState = field(default_factory=VendorState)
    key_file: KeyFile | None = None
    kms: KmsBoot | None = None
    key_provider: Literal["none", "local-sgx"] = "none"
    allow_emit_event: bool = True
    user_config: str | None = None
    encrypted_env: bytes = b""
    release: Release = DEFAULT

    @property
    def name(self) -> str:
        """The app's name, followed by the instance's if it has one."""
        return f"{self.manifest.name}: {self.instance}" if self.instance else self.manifest.name

    @property
    def manifest(self) -> AppManifest:
        """The app-compose as a guest of the release reads it; raise `FormatError` if it is none."""
        return AppManifest.parse(self.compose.text, self.release)


def instance_seed(seed: Seed, name: str) -> bytes:
    """Derive the 32 bytes from which the instance id of a guest of that name is computed."""
    return seed.derive(f"instance {name}", 32)


def local_key_provider(seed: Seed, name: str) -> KeyProvider:
    """Return the local key provider, an SGX enclave, of a guest of that name."""
    return KeyProvider("local-sgx", seed.derive(f"key provider of {name}", 32).hex())


def power_on(intel: Intel, config: GuestConfig) -> TrustDomain:
    """Boot a trust domain until it needs keys; raise `FormatError` if its configuration is invalid."""
    seed, machine = Seed.of(config.seed), config.machine
    platform = intel.platform(config.platform)
    platform.state, intel.state = config.platform_state, config.vendor_state
    image = (
        OsImage.from_seed(seed.derive, machine.image, machine.version or config.release.version)
        if machine.directory is None
        else load_image(machine.directory)
    )
    vm_config = image.vm_config(machine.cpu_count, machine.memory_size)
    if machine.config is not None:
        given = VmConfig.parse(machine.config)
        if given.tdx_measurement is not None and machine.directory is None:
            image, vm_config = OsImage.of_config(given), given
    domain = TrustDomain(
        platform,
        image,
        config.compose,
        instance_seed=instance_seed(seed, config.name),
        vm_config=vm_config,
        claimed_config=machine.config,
        app_id=config.app_id,
        settings=config.settings,
        user_config=config.user_config,
        release=config.release,
    )
    domain.boot()
    return domain
