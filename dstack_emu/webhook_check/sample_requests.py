"""Requests for a webhook: those of a stack's KMS about itself and about an app, and variations of them.

The values are those of a seed's stack, so a webhook that allows the KMS and the app of `dstack-emu up` allows these.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Final, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic.alias_generators import to_camel

from dstack_emu.attest.app_info import BootInfo, decode_app_info
from dstack_emu.attest.hexadecimal import decode_hex
from dstack_emu.attest.release import DEFAULT, Release
from dstack_emu.deployment.guest_config import GuestConfig, local_key_provider, power_on
from dstack_emu.simulator.intel import Intel
from dstack_emu.simulator.seed import Seed
from dstack_emu.simulator.trust_domain import AppCompose
from dstack_emu.transport.validation import describe

Hex = Annotated[str, StringConstraints(pattern=r"^(0x)?([0-9a-fA-F]{2})*$", max_length=10_000)]
_TEXTS: Final = ("tcb_status", "advisory_ids", "tee_variant")
"""The fields of a request that are text; all others are bytes."""


class SampleError(Exception):
    """A value does not fit a request; the text says which."""


@dataclass(frozen=True, slots=True)
class Variation(BootInfo):
    """A request in another form: with `more` members (JSON), other `variant_members`, or another body (`instead`).

    By default it has the TEE variant under the names of all releases, so that a webhook of any release understands it.
    """

    more: str = "{}"
    variant_members: tuple[str, ...] = ("teeVariant", "attestationMode")
    instead: bytes | None = None

    @classmethod
    def of(cls, boot_info: BootInfo, **changes: Any) -> Self:
        """Make a variation of a request."""
        return cls(**{field.name: getattr(boot_info, field.name) for field in fields(BootInfo)}, **changes)

    def to_json(self, *, variant_members: tuple[str, ...] = ()) -> bytes:
        """Encode the request, with the variation's own `variant_members` in place of the argument."""
        if self.instead is not None:
            return self.instead
        document = json.loads(BootInfo.to_json(self, variant_members=self.variant_members))
        return json.dumps(document | json.loads(self.more), separators=(",", ":")).encode()


class _Values(BaseModel):
    """Fields of a request, by their names in JSON, that replace the values of the seed."""

    model_config = ConfigDict(extra="forbid", alias_generator=to_camel)

    mr_aggregated: Hex | None = None
    os_image_hash: Hex | None = None
    mr_system: Hex | None = None
    app_id: Hex | None = None
    compose_hash: Hex | None = None
    instance_id: Hex | None = None
    device_id: Hex | None = None
    key_provider_info: Hex | None = None
    tcb_status: str | None = None
    advisory_ids: tuple[str, ...] | None = None
    tee_variant: str | None = None
    attestation_mode: str | None = Field(default=None, exclude=True)

    def applied_to(self, boot_info: Variation) -> Variation:
        """Return the request with these values."""
        given: dict[str, Any] = self.model_dump(exclude_none=True)
        if self.attestation_mode is not None:
            given.setdefault("tee_variant", self.attestation_mode)
        values: dict[str, Any] = {n: v if n in _TEXTS else decode_hex(v) for n, v in given.items()}
        return replace(boot_info, **values)


class _ForEach(BaseModel):
    """Values for each of the two requests."""

    model_config = ConfigDict(extra="forbid")

    kms: _Values = Field(default_factory=_Values)
    app: _Values = Field(default_factory=_Values)


@dataclass(frozen=True, slots=True)
class SampleRequests:
    """The requests to bootAuth/kms and to bootAuth/app."""

    kms: Variation
    app: Variation

    @classmethod
    def of_seed(cls, seed: str, release: Release = DEFAULT) -> Self:
        """Make the requests about the source KMS and the app of that seed's stack of a dstack release."""
        return cls(
            _boot_info(seed, "kms-src", release, has_keys=True), _boot_info(seed, "app", release, has_keys=False)
        )

    def with_values(self, document: Any) -> "SampleRequests":
        """Return the requests with other values: fields for both requests, or separate ones under `kms` and `app`.

        Raises `SampleError` if a value does not fit.
        """
        if not isinstance(document, Mapping):
            raise SampleError(f"an object expected, got {type(document).__name__}")
        try:
            if document.keys() <= {"kms", "app"}:
                each = _ForEach.model_validate(document)
                return SampleRequests(each.kms.applied_to(self.kms), each.app.applied_to(self.app))
            both = _Values.model_validate(document)
        except ValidationError as error:
            raise SampleError(describe(error)) from error
        return SampleRequests(both.applied_to(self.kms), both.applied_to(self.app))


def _boot_info(seed: str, name: str, release: Release, *, has_keys: bool) -> Variation:
    config = GuestConfig(seed=seed, platform=f"host of {name}", compose=AppCompose.named(name), release=release)
    domain = power_on(Intel(Seed.of(seed)), config)
    if has_keys:
        domain.complete(local_key_provider(Seed.of(seed), name))
    info = decode_app_info(domain.attest(bytes(64)), device_id=domain.platform.device_id)
    return Variation.of(BootInfo.about(info, "UpToDate", ()))
