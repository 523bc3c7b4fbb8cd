"""dstack-auth's rules: an allowlist and a boot info in, a decision out. Pure.

They are wider than auth-simple's: TCB status and advisories are not checked, an empty `osImages` admits every OS image
for apps and is not checked for a KMS, and an empty `devices` admits every device. The rules do not establish that the
boot info is true: the KMS verifies that.

JSON is what serde takes: a known member must have its type, `null` is not a value, and unknown members are ignored. Two
forms that serde takes are refused: a repeated unknown member, and an array in place of an object.

Source: dstack next 312dc605, `crates/dstack-auth/src/main.rs`. Members that later releases add to the file, such as
`rootEpochs` and those for the platform's state, are unknown here.
"""

from collections.abc import Mapping
from typing import Annotated, Final, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, StrictBool, ValidationError
from pydantic.alias_generators import to_camel

from dstack_emu.attest.strict_json import DuplicateMemberError, StrictJson, TooManyValuesError
from dstack_emu.auth.boot_info import MAX_VALUES, PolicyDecision, ReceivedBootInfo, Refusal
from dstack_emu.auth.errors import AuthConfigError, MalformedJsonError, MistypedBootInfoError, OversizedJsonError
from dstack_emu.transport.validation import describe

M = TypeVar("M", bound=BaseModel)

AllowlistRule = Literal[
    "os_image", "kms_mr_aggregated", "kms_device", "app_registered", "app_compose_hash", "app_device", "allowed"
]
ALLOWLIST_RULES: Final[tuple[AllowlistRule, ...]] = get_args(AllowlistRule)

_REASONS: Final[Mapping[AllowlistRule, str]] = {
    "os_image": "os image not allowed",
    "kms_mr_aggregated": "kms mrAggregated not allowed",
    "kms_device": "device not allowed",
    "app_registered": "app not registered",
    "app_compose_hash": "compose hash not allowed",
    "app_device": "device not allowed",
    "allowed": "ok",
}


def normalize_id(text: str) -> str:
    """Return `text` as dstack-auth compares it: trimmed, without one leading `0x`, in lowercase."""
    return text.strip().lower().removeprefix("0x")


def _normalize_all(values: frozenset[str]) -> frozenset[str]:
    return frozenset(map(normalize_id, values))


IdSet = Annotated[frozenset[str], AfterValidator(_normalize_all)]


class _Document(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, extra="ignore", frozen=True)


class KmsEntry(_Document):
    """The member `kms`: an empty or absent `mrAggregated` admits no KMS."""

    mr_aggregated: IdSet = frozenset()
    devices: IdSet = frozenset()
    allow_any_device: StrictBool = False


class AppEntry(_Document):
    """One app of `apps`: an empty or absent `composeHashes` admits no compose file."""

    compose_hashes: IdSet = frozenset()
    devices: IdSet = frozenset()
    allow_any_device: StrictBool = False


def _normalize_apps(apps: Mapping[str, AppEntry]) -> Mapping[str, AppEntry]:
    """Return the apps by their normalized ids; upstream takes any of two spellings of one id, here it is an error."""
    normalized: dict[str, AppEntry] = {}
    for app_id, app in apps.items():
        if normalized.setdefault(normalize_id(app_id), app) is not app:
            raise ValueError(f"{app_id} is listed twice")
    return normalized


class Allowlist(_Document):
    """An allowlist file's content, ids normalized; without content it denies everything."""

    os_images: IdSet = frozenset()
    gateway_app_id: str = ""
    kms: KmsEntry = KmsEntry()
    apps: Annotated[Mapping[str, AppEntry], AfterValidator(_normalize_apps)] = {}


class _ReceivedBoot(_Document):
    """The members of a boot info that dstack-auth reads; an absent one is empty, and matches no listed id."""

    mr_aggregated: str = ""
    os_image_hash: str = ""
    app_id: str = ""
    compose_hash: str = ""
    device_id: str = ""


def parse_allowlist(content: bytes) -> Allowlist:
    """Parse an allowlist file's bytes; raise `AuthConfigError`, which says what is wrong, without the file's name."""
    try:
        return _parse(Allowlist, content, None)
    except ValidationError as error:
        raise AuthConfigError(describe(error)) from error
    except ValueError as error:
        raise AuthConfigError(f"Invalid JSON: {error}") from error


def parse_allowlist_boot_info(body: bytes) -> ReceivedBootInfo:
    """Parse a request's body; members that dstack-auth does not read are empty, whatever the body says.

    Raises `MalformedJsonError` if it is not JSON, `OversizedJsonError` if it has too many values, and
    `MistypedBootInfoError` if it is JSON of another shape.
    """
    try:
        received = _parse(_ReceivedBoot, body, MAX_VALUES)
    except ValidationError as error:
        is_json = error.errors()[0]["type"] != "json_invalid"
        raise (MistypedBootInfoError if is_json else MalformedJsonError)(describe(error)) from error
    except DuplicateMemberError as error:
        raise MistypedBootInfoError(str(error)) from error
    except TooManyValuesError as error:
        raise OversizedJsonError(str(error)) from error
    except ValueError as error:
        raise MalformedJsonError(f"Invalid JSON: {error}") from error
    return ReceivedBootInfo(**received.model_dump(), instance_id="")


def _parse(model: type[M], data: bytes, most: int | None) -> M:
    _JSON.parse(data.decode(), most)  # pydantic's own parser takes NaN, and the last of two members of one name
    return model.model_validate_json(data)


def evaluate_allowlist(allowlist: Allowlist, boot_info: ReceivedBootInfo, is_kms: bool) -> PolicyDecision:
    """Decide; the rules run in upstream's order, and the first that refuses gives the reason."""
    kms = allowlist.kms
    refusal = _kms_refusal(kms, boot_info) if is_kms else _app_refusal(allowlist, boot_info)
    rule = "allowed" if refusal is None else refusal.rule
    reason = _REASONS["allowed"] if refusal is None else refusal.reason
    return PolicyDecision(refusal is None, reason, allowlist.gateway_app_id, rule, refusal=refusal)


def _refusal(rule: AllowlistRule, member: str, got: str, expected: frozenset[str], *path: str) -> Refusal:
    return Refusal(rule, _REASONS[rule], member, (got,), expected, path)


def _kms_refusal(kms: KmsEntry, boot_info: ReceivedBootInfo) -> Refusal | None:
    measured = boot_info.mr_aggregated
    if normalize_id(measured) not in kms.mr_aggregated:
        path = ("kms", "mrAggregated")
        return _refusal("kms_mr_aggregated", "mrAggregated", measured, kms.mr_aggregated, *path)
    if not _is_device_admitted(kms, boot_info):
        return _refusal("kms_device", "deviceId", boot_info.device_id, kms.devices, "kms", "devices")
    return None


def _app_refusal(allowlist: Allowlist, boot_info: ReceivedBootInfo) -> Refusal | None:
    image, images = boot_info.os_image_hash, allowlist.os_images
    if images and normalize_id(image) not in images:
        return _refusal("os_image", "osImageHash", image, images, "osImages")
    app_id, compose_hash = normalize_id(boot_info.app_id), boot_info.compose_hash
    app = allowlist.apps.get(app_id)
    if app is None:
        return _refusal("app_registered", "appId", boot_info.app_id, frozenset(allowlist.apps), "apps")
    if normalize_id(compose_hash) not in app.compose_hashes:
        path = ("apps", app_id, "composeHashes")
        return _refusal("app_compose_hash", "composeHash", compose_hash, app.compose_hashes, *path)
    if not _is_device_admitted(app, boot_info):
        return _refusal("app_device", "deviceId", boot_info.device_id, app.devices, "apps", app_id, "devices")
    return None


def _is_device_admitted(entry: KmsEntry | AppEntry, boot_info: ReceivedBootInfo) -> bool:
    return entry.allow_any_device or not entry.devices or normalize_id(boot_info.device_id) in entry.devices


_JSON: Final = StrictJson()
