"""The specifications of a stack's trust domains and KMS, in the control API and in saved states."""

from typing import Annotated, Any, Final, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from dstack_emu.attest.certificate import EvidenceForm
from dstack_emu.attest.encrypted_env import MAX_FILE_SIZE
from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.hexadecimal import decode_hex
from dstack_emu.attest.release import release
from dstack_emu.simulator.image import GIB

Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,31}$")]


def _release_name(text: object) -> str:
    try:
        return release(str(text)).name  # in JSON `0.5` may be a number, too: a shell has no quotes for it
    except FormatError as error:
        raise ValueError(str(error)) from error


ReleaseName = Annotated[str, BeforeValidator(_release_name)]


def _hex(text: object) -> object:
    """Refuse text that is no hex in words; the pattern, which would be named otherwise, is for the OpenAPI document."""
    if isinstance(text, str):
        try:
            decode_hex(text)
        except ValueError as error:
            raise ValueError(f"hex expected, got {text!r:.60}: {error}") from error
    return text


HEX_PATTERN: Final = r"^(0x)?([0-9a-fA-F]{2})*$"
Hex = Annotated[str, StringConstraints(pattern=HEX_PATTERN, max_length=20_000), BeforeValidator(_hex)]


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


LongHex = Annotated[
    str, StringConstraints(pattern=HEX_PATTERN, max_length=2 * MAX_FILE_SIZE + 2), BeforeValidator(_hex)
]


class EventSpec(_Spec):
    """A runtime event; `payload` is hex. With `measured` false it is in the log, but no register is extended."""

    event: Annotated[str, Field(min_length=1, max_length=200)]
    payload: Hex = ""
    measured: bool = True


class GuestSpec(_Spec):
    """The identity of a trust domain: everything that is measured, and the platform it runs on.

    By default `app_id` is the first 20 bytes of the compose hash, and `compose` (the text of its app-compose.json) is
    generated. Without `image` it boots the stack's image, or that of `image_version`; another image has the version of
    the release by default. `release` is the dstack release of its guest, by default that of the stack; the host of that
    release chooses an `mr_config_id` that is not given. `events` are measured after the boot's own events, before keys
    are fetched. `instance` distinguishes instances of an app. `user_config` is the text of the app's own file,
    `encrypted_env` the encrypted environment of its deployment, which is decrypted into a file once there are keys.
    """

    name: Name
    app_id: Hex | None = None
    compose: str | None = None
    instance: str | None = None
    image: str | None = None
    image_version: str | None = None
    release: ReleaseName | None = None
    platform: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    cpu_count: Annotated[int, Field(ge=1, le=1024)] = 2
    memory_size: Annotated[int, Field(ge=1)] = 2 * GIB
    debug: bool = False
    mr_config_id: Hex | None = None
    quote_version: Annotated[int, Field(ge=4, le=5)] = 4
    events: Annotated[tuple[EventSpec, ...], Field(max_length=1000)] = ()
    user_config: str | None = None
    encrypted_env: LongHex = ""

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        if self.app_id is not None and len(decode_hex(self.app_id)) != 20:
            raise ValueError(f"app_id: 20 bytes expected, got {len(decode_hex(self.app_id))}")
        return self

    @property
    def platform_name(self) -> str:
        """The name of its platform: `host of NAME` unless given."""
        return self.platform or f"host of {self.name}"


class KmsSpec(_Spec):
    """A KMS: its name (`third` is the service `kms-third` in the trust domain `kms-third`), and its webhook.

    `webhook` is `own` (a new auth-simple with a policy of its own, that denies everyone), the name of another KMS whose
    webhook it shares, or the URL of any webhook. Fields of the trust domain are those of `GuestSpec`; `settings` are
    keys of kms.toml's [core], `rpc_cert_evidence` and `auth_api_cache` keys of its [emulator]: with `legacy` evidence
    it is a source of 0.5.x, and a cache that is not given is the stack's if its release has one.
    """

    name: Annotated[Name, Field(max_length=20)]
    webhook: Annotated[str, Field(min_length=1, max_length=2000)] = "own"
    platform: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    image: str | None = None
    image_version: str | None = None
    release: ReleaseName | None = None
    compose: str | None = None
    rpc_cert_evidence: EvidenceForm = "versioned"
    auth_api_cache: bool | None = None
    settings: dict[str, Any] = Field(default_factory=dict)

    @property
    def service(self) -> str:
        """The name of its service, and of its trust domain."""
        return f"kms-{self.name}"

    @property
    def asks_foreign_webhook(self) -> bool:
        """Whether its webhook is that of a URL, which has no policy in the stack."""
        return self.webhook.startswith(("http://", "https://"))

    @property
    def guest(self) -> GuestSpec:
        """The trust domain it runs in."""
        return GuestSpec(
            name=self.service,
            platform=self.platform,
            image=self.image,
            image_version=self.image_version,
            release=self.release,
            compose=self.compose,
        )
