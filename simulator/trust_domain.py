"""A trust domain (CVM): its boot, its registers, its evidence.

The boot sequence is that of dstack-util: the measured events and their order, before and after keys are fetched. It has
no sockets and no keys: `simulator.agent` answers for it. Source: dstack `dstack-util/src/system_setup.rs` at 312dc605
(0.5.x measures `mr-kms` before `os-image-hash`).
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Final, Literal, Self

from dstack_emu.attest.attestation import Attestation
from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.eventlog import BOOT_MR_DONE, SYSTEM_READY, RuntimeEvent, TdxEvent
from dstack_emu.attest.quote import TdReport, TdReport15
from dstack_emu.attest.vmconfig import VmConfig
from dstack_emu.simulator.image import OsImage
from dstack_emu.simulator.platform import TEE_TCB_SVN, Platform

TD_ATTRIBUTES: Final = bytes.fromhex("0000001000000000")
"""SEPT_VE_DISABLE set, debug off, as in production."""
TD_ATTRIBUTES_DEBUG: Final = bytes.fromhex("0100001000000000")
XFAM: Final = bytes.fromhex("e702060000000000")
_ZERO: Final = bytes(48)


@dataclass(frozen=True, slots=True)
class AppCompose:
    """An app-compose.json: the exact text (its SHA-256 is the compose hash) and the keys that affect the guest."""

    text: str
    name: str
    public_tcbinfo: bool
    no_instance_id: bool

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse the file's text; raise `FormatError` if it is not an app-compose."""
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"app-compose: JSON expected ({error})") from error
        if not isinstance(document, dict):
            raise FormatError(f"app-compose: object expected, got {type(document).__name__}")
        return cls(
            text,
            _key(document, "name", str, ""),
            _key(document, "public_tcbinfo", bool, True),
            _key(document, "no_instance_id", bool, False),
        )

    @classmethod
    def named(cls, name: str) -> Self:
        """Make a synthetic app-compose for an app of that name."""
        document = {
            "manifest_version": 2,
            "name": name,
            "runner": "docker-compose",
            "docker_compose_file": f"services:\n  {name}:\n    image: {name}\n",
            "kms_enabled": True,
            "gateway_enabled": False,
            "public_logs": True,
            "public_sysinfo": True,
            "public_tcbinfo": True,
            "allowed_envs": [],
            "no_instance_id": False,
            "secure_time": False,
        }
        return cls.parse(json.dumps(document, indent=2))

    @property
    def compose_hash(self) -> bytes:
        """Return the SHA-256 of the text, 32 bytes."""
        return hashlib.sha256(self.text.encode()).digest()


@dataclass(frozen=True, slots=True)
class KeyProvider:
    """The source of the guest's keys.

    `none` with an empty id, `local-sgx` with its MR, `kms` with the SPKI of its root CA (all hex).
    """

    name: Literal["none", "local-sgx", "kms"]
    id: str = ""

    def to_json(self) -> bytes:
        """Return the payload of the `key-provider` event."""
        return json.dumps({"name": self.name, "id": self.id}, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True)
class DomainSettings:
    """Settings of a trust domain apart from what it boots: its debug bit (no verifier accepts it) and its quotes.

    `mr_config_id` is 48 bytes, `quote_version` is 4 or 5; `td15` (version 5 only) selects the longer report of TDX 1.5.
    """

    debug: bool = False
    mr_config_id: bytes = _ZERO
    quote_version: int = 4
    td15: bool = False

    def __post_init__(self) -> None:
        if len(self.mr_config_id) != len(_ZERO):
            raise FormatError(f"mr_config_id: {len(_ZERO)} bytes expected, got {len(self.mr_config_id)}")
        if self.quote_version not in (4, 5) or (self.td15 and self.quote_version != 5):
            raise FormatError(f"quote version: 4, or 5 (alone with TD15), expected, got {self.quote_version}")


@dataclass(frozen=True, slots=True)
class TrustDomainState:
    """The state of a trust domain that changes after power-on: RTMR3 (48 bytes) and the runtime events in its log."""

    rtmr3: bytes
    events: tuple[RuntimeEvent, ...]


class TrustDomain:
    """One VM from power-on: `boot` measures its identity, `complete` the events after it got its keys.

    It boots `image` as the VM that `vm_config` describes. `claimed_config` is the text of the configuration that it
    reports, by default that of `vm_config`.
    """

    def __init__(
        self,
        platform: Platform,
        image: OsImage,
        compose: AppCompose,
        *,
        instance_seed: bytes,
        vm_config: VmConfig | None = None,
        claimed_config: str | None = None,
        app_id: bytes | None = None,
        settings: DomainSettings | None = None,
    ) -> None:
        self.platform, self.image, self.compose = platform, image, compose
        self.settings = settings or DomainSettings()
        self.vm_config = vm_config or image.vm_config()
        self.vm_config_json = self.vm_config.to_json() if claimed_config is None else claimed_config
        self.app_id = app_id if app_id is not None else compose.compose_hash[:20]
        self.instance_id = b"" if compose.no_instance_id else hashlib.sha256(instance_seed + self.app_id).digest()[:20]
        registers, log = image.boot(self.vm_config)
        self._mr_td = registers.mrtd
        self._rtmrs = [registers.rtmr0, registers.rtmr1, registers.rtmr2, _ZERO]
        self._firmware_log = self._log = log
        self.runtime_events: tuple[RuntimeEvent, ...] = ()

    @property
    def event_log(self) -> tuple[TdxEvent, ...]:
        """Return the whole log: the firmware's events, then the runtime events."""
        return self._log

    @property
    def compose_hash(self) -> bytes:
        """Return the SHA-256 of the app-compose text, 32 bytes."""
        return self.compose.compose_hash

    def boot(self) -> None:
        """Measure the domain's identity. Keys are fetched from a KMS after it."""
        self.measure("system-preparing", b"")
        self.measure("app-id", self.app_id)
        self.measure("compose-hash", self.compose_hash)
        self.measure("instance-id", self.instance_id)
        self.measure(BOOT_MR_DONE, b"")

    def complete(
        self, key_provider: KeyProvider, *, os_image_hash: bytes | None = None, mr_kms: bytes | None = None
    ) -> None:
        """Measure the source of the keys, and complete the boot.

        `os_image_hash` comes from the KMS's answer; only 0.5.x measures `mr_kms`.
        """
        if mr_kms is not None:
            self.measure("mr-kms", mr_kms)
        if os_image_hash is not None:
            self.measure("os-image-hash", os_image_hash)
        self.measure("key-provider", key_provider.to_json())
        self.measure("storage-fs", b"zfs")
        self.measure(SYSTEM_READY, b"")

    def measure(self, event: str, payload: bytes) -> None:
        """Extend RTMR3 with a runtime event."""
        runtime = RuntimeEvent(event, payload)
        line = TdxEvent.of(runtime)
        self._rtmrs[3] = hashlib.sha384(self._rtmrs[3] + line.digest).digest()
        self.runtime_events += (runtime,)
        self._log += (line,)

    def claim(self, event: str, payload: bytes) -> None:
        """Add a runtime event to the log without measuring it: the domain's evidence is invalid afterwards."""
        self.restore(TrustDomainState(self._rtmrs[3], (*self.runtime_events, RuntimeEvent(event, payload))))

    def capture(self) -> TrustDomainState:
        """Return what changed since power-on."""
        return TrustDomainState(self._rtmrs[3], self.runtime_events)

    def restore(self, state: TrustDomainState) -> None:
        """Restore RTMR3 and the runtime events."""
        if state == self.capture():
            return  # keep the same log object: caches find it by its identity
        self._rtmrs[3], self.runtime_events = state.rtmr3, state.events
        self._log = (*self._firmware_log, *(TdxEvent.of(event) for event in self.runtime_events))

    def report(self, report_data: bytes) -> TdReport:
        """Return the TD report, as the TDX module makes it, over 64 bytes of report_data."""
        fields = (
            TEE_TCB_SVN,
            self.platform.mr_seam,
            _ZERO,  # mr_signer_seam
            bytes(8),  # seam_attributes
            TD_ATTRIBUTES_DEBUG if self.settings.debug else TD_ATTRIBUTES,
            XFAM,
            self._mr_td,
            self.settings.mr_config_id,
            _ZERO,  # mr_owner
            _ZERO,  # mr_owner_config
            *self._rtmrs,
            report_data,
        )
        report = TdReport(*fields)
        return TdReport15.of(report, TEE_TCB_SVN) if self.settings.td15 else report

    def attest(self, report_data: bytes) -> Attestation:
        """Quote 64 bytes of report_data; return the evidence in the form of real hardware (V0)."""
        quote = self.platform.quote(self.report(report_data), self.settings.quote_version)
        return Attestation(quote, self._log, self.runtime_events, report_data, self.vm_config_json)


def _key(document: dict[str, Any], key: str, kind: type, default: Any) -> Any:
    value = document.get(key, default)
    if not isinstance(value, kind):
        raise FormatError(f"app-compose: {key}: {kind.__name__} expected, got {type(value).__name__}")
    return value
