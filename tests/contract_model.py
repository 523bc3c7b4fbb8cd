"""The rules of DstackKms and DstackApp in Python, written from their description, and not from the contracts here."""

from dataclasses import dataclass, field

from dstack_emu.chain.contracts import BootInfo

UP_TO_DATE = "UpToDate"
Answer = tuple[bool, str]


@dataclass
class AppModel:
    """What an app's contract knows."""

    compose_hashes: set[bytes] = field(default_factory=set)
    devices: set[bytes] = field(default_factory=set)
    any_device: bool = False
    requires_tcb: bool = False

    def decide(self, boot: BootInfo) -> Answer:
        if self.requires_tcb and boot.tcb_status != UP_TO_DATE:
            return False, "TCB status is not up to date"
        if boot.compose_hash not in self.compose_hashes:
            return False, "Compose hash not allowed"
        if not (self.any_device or boot.device_id in self.devices):
            return False, "Device not allowed"
        return True, ""


@dataclass
class KmsModel:
    """What the KMS's contract knows. `contracts` are the apps with code, `registered` the addresses it was told."""

    images: set[bytes] = field(default_factory=set)
    kms: set[bytes] = field(default_factory=set)
    devices: set[bytes] = field(default_factory=set)
    registered: set[bytes] = field(default_factory=set)
    contracts: dict[bytes, AppModel] = field(default_factory=dict)

    def decide_kms(self, boot: BootInfo) -> Answer:
        rules = (
            (boot.tcb_status == UP_TO_DATE, "TCB status is not up to date"),
            (boot.os_image_hash in self.images, "OS image is not allowed"),
            (boot.mr_aggregated in self.kms, "Aggregated MR not allowed"),
            (boot.device_id in self.devices, "KMS is not allowed to boot on this device"),
        )
        return next(((False, reason) for kept, reason in rules if not kept), (True, ""))

    def decide_app(self, boot: BootInfo) -> Answer:
        rules = (
            (boot.app_id in self.registered, "App not registered"),
            (boot.os_image_hash in self.images, "OS image is not allowed"),
            (boot.app_id in self.contracts, "App not deployed or invalid address"),
        )
        refusal = next((reason for kept, reason in rules if not kept), None)
        return self.contracts[boot.app_id].decide(boot) if refusal is None else (False, refusal)
