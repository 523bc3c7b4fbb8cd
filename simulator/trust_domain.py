"""A trust domain (CVM): its boot, its registers, its evidence.

The boot sequence is that of dstack-util in one release: the measured events and their order are in `attest.boot`. A
domain has no sockets and no keys: `simulator.agent` answers for it.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Literal, Self

from dstack_emu.attest.app_compose import AppManifest
from dstack_emu.attest.app_policy import GuestFacts, verify_gpu_policy, verify_key_provider_id, verify_policy
from dstack_emu.attest.attestation import Attestation
from dstack_emu.attest.boot import (
    AppIdentity,
    LaunchConfig,
    events_before_keys,
    events_from_kms,
    events_with_keys,
    guest_app_id,
    guest_instance_id,
    launch_config,
)
from dstack_emu.attest.errors import FormatError, VerificationError
from dstack_emu.attest.eventlog import RuntimeEvent, TdxEvent, require_few_events
from dstack_emu.attest.mr_config import KeyProviderKind, verify_mr_config_id
from dstack_emu.attest.quote import TdReport, TdReport15
from dstack_emu.attest.release import DEFAULT, Release
from dstack_emu.attest.vmconfig import VmConfig
from dstack_emu.simulator.errors import GuestError
from dstack_emu.simulator.image import OsImage
from dstack_emu.simulator.platform import TEE_TCB_SVN, Platform

TD_ATTRIBUTES: Final = bytes.fromhex("0000001000000000")
"""SEPT_VE_DISABLE set, debug off, as in production."""
TD_ATTRIBUTES_DEBUG: Final = bytes.fromhex("0100001000000000")
XFAM: Final = bytes.fromhex("e702060000000000")
_ZERO: Final = bytes(48)


@dataclass(frozen=True, slots=True)
class AppCompose:
    """The text of an app-compose.json, to the byte. What it says depends on the guest's release: `AppManifest`."""

    text: str

    @classmethod
    def named(cls, name: str, *, gateway_enabled: bool = False) -> Self:
        """Make a synthetic app-compose for an app of that name."""
        document = {
            "manifest_version": 2,
            "name": name,
            "runner": "docker-compose",
            "docker_compose_file": f"services:\n  {name}:\n    image: {name}\n",
            "kms_enabled": True,
            "gateway_enabled": gateway_enabled,
            "public_logs": True,
            "public_sysinfo": True,
            "public_tcbinfo": True,
            "allowed_envs": [],
            "no_instance_id": False,
            "secure_time": False,
        }
        return cls(json.dumps(document, indent=2))


@dataclass(frozen=True, slots=True)
class KeyProvider:
    """The source of the guest's keys.

    `none` with an empty id, `local-sgx` with its MR, `kms` with the SPKI of its root CA (all hex).
    """

    name: Literal["none", "local-sgx", "kms"]
    id: str = ""

    @property
    def kind(self) -> KeyProviderKind:
        """Return the name that an app-compose has for the provider."""
        return "local" if self.name == "local-sgx" else self.name

    def to_json(self) -> bytes:
        """Return the payload of the `key-provider` event."""
        return json.dumps({"name": self.name, "id": self.id}, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True)
class DomainSettings:
    """Settings of a trust domain apart from what it boots: its debug bit (no verifier accepts it) and its quotes.

    `mr_config_id` is 48 bytes, or None for what a host of the domain's release chooses. `quote_version` is 4 or 5;
    `td15` (version 5 only) selects the longer report of TDX 1.5.
    """

    debug: bool = False
    mr_config_id: bytes | None = None
    quote_version: int = 4
    td15: bool = False

    def __post_init__(self) -> None:
        if self.mr_config_id is not None and len(self.mr_config_id) != len(_ZERO):
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

    It boots `image` as the VM that `vm_config` describes, with the guest of a dstack release. `claimed_config` is the
    text of the configuration that it reports, by default that of `vm_config`; `user_config` is the app's own file.
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
        user_config: str | None = None,
        release: Release = DEFAULT,
    ) -> None:
        self.platform, self.image, self.release = platform, image, release
        self.manifest = AppManifest.parse(compose.text, release)
        self.user_config = user_config
        self.settings = settings or DomainSettings()
        self.vm_config = vm_config or image.vm_config()
        self.vm_config_json = self.vm_config.to_json() if claimed_config is None else claimed_config
        # An app-compose that names no key provider serves with any; see docs/fidelity.md.
        provider = self.manifest.key_provider or "kms"
        self.app_id = guest_app_id(self.compose_hash, app_id or b"", provider, release)
        self.instance_id = b"" if self.manifest.no_instance_id else guest_instance_id(instance_seed, self.app_id)
        self.launch_config = self._launch_config()
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
        return self.manifest.compose_hash

    @property
    def identity(self) -> AppIdentity:
        """Return what is measured of the app before there are keys."""
        return AppIdentity(
            app_id=self.app_id,
            compose_hash=self.compose_hash,
            instance_id=self.instance_id,
            init_script_hashes=self.manifest.init_script_hashes,
            gpu_policy_hash=self.manifest.gpu_policy_hash,
        )

    def boot(self) -> None:
        """Check the app-compose, and measure the domain's identity. Keys are fetched from a KMS after it.

        Raises `GuestError` if the guest refuses the app-compose; nothing is measured then.
        """
        facts = GuestFacts(self.image.version, self.vm_config_json, user_config=self.user_config)
        with _refusing():
            verify_policy(self.manifest, facts, self.release)
        with _refusing("Failed to measure app info: "):
            verify_gpu_policy(self.manifest)
        self._measure_all(events_before_keys(self.identity, self.release))

    def complete(
        self, key_provider: KeyProvider, *, os_image_hash: bytes | None = None, mr_kms: bytes | None = None
    ) -> None:
        """Measure the source of the keys, and complete the boot.

        `os_image_hash` comes from the KMS's answer; only 0.5.x measures `mr_kms`. Raises `GuestError` if the guest
        refuses the key provider, or what its host bound it to.
        """
        if os_image_hash is not None:
            self._measure_all(events_from_kms(os_image_hash, mr_kms, self.release))
        with _refusing("Failed to verify app: "):
            self._verify_launch(key_provider.kind, bytes.fromhex(key_provider.id))
        with _refusing():
            storage_fs = self.manifest.file_system()
        self._measure_all(events_with_keys(key_provider.to_json(), self.release, storage_fs=storage_fs))

    def _launch_config(self) -> LaunchConfig:
        if self.settings.mr_config_id is not None:
            return LaunchConfig(self.settings.mr_config_id)
        return launch_config(self.identity, self.manifest, self.release)

    def _verify_launch(self, key_provider: KeyProviderKind, provider_id: bytes) -> None:
        launch, observed = self.launch_config, self.identity.observed(key_provider, provider_id)
        verify_mr_config_id(launch.mr_config_id, observed, self.release, document=launch.document)
        verify_key_provider_id(self.manifest, provider_id)

    def _measure_all(self, events: Iterable[tuple[str, bytes]]) -> None:
        for event, payload in events:
            self.measure(event, payload)

    @property
    def _event_version(self) -> int:
        return self.manifest.event_log_version

    def measure(self, event: str, payload: bytes) -> None:
        """Extend RTMR3 with a runtime event, in the version of the event log that the app asks for.

        Raises `FormatError` if the log would have more events than a verifier reads.
        """
        require_few_events(len(self._log) + 1, "event log")
        runtime = RuntimeEvent(event, payload, self._event_version)
        line = TdxEvent.of(runtime)
        self._rtmrs[3] = hashlib.sha384(self._rtmrs[3] + line.digest).digest()
        self.runtime_events += (runtime,)
        self._log += (line,)

    def claim(self, event: str, payload: bytes) -> None:
        """Add a runtime event to the log without measuring it: the domain's evidence is invalid afterwards."""
        self.restore(
            TrustDomainState(self._rtmrs[3], (*self.runtime_events, RuntimeEvent(event, payload, self._event_version)))
        )

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
            self.launch_config.mr_config_id,
            _ZERO,  # mr_owner
            _ZERO,  # mr_owner_config
            *self._rtmrs,
            report_data,
        )
        report = TdReport(*fields)
        return TdReport15.of(report, TEE_TCB_SVN) if self.settings.td15 else report

    def attest(self, report_data: bytes) -> Attestation:
        """Quote 64 bytes of report_data; return the evidence in the form of real hardware.

        That is V0, or V1 with a log of version 2.
        """
        quote = self.platform.quote(self.report(report_data), self.settings.quote_version)
        wire: Literal[0, 1] = 0 if self._event_version == 1 else 1
        return Attestation(quote, self._log, self.runtime_events, report_data, self.vm_config_json, wire=wire)


@contextmanager
def _refusing(step: str = "") -> Iterator[None]:
    try:
        yield
    except VerificationError as error:
        raise GuestError(f"{step}{error}") from error
