"""The trust domain that a specification describes, booted until it needs keys."""

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.hexadecimal import decode_hex
from dstack_emu.attest.release import Release
from dstack_emu.deployment.context import StackContext
from dstack_emu.deployment.guest_config import instance_seed
from dstack_emu.deployment.specs import GuestSpec
from dstack_emu.simulator.image import OsImage
from dstack_emu.simulator.trust_domain import AppCompose, DomainSettings, TrustDomain


def boot_domain(context: StackContext, spec: GuestSpec) -> TrustDomain:
    """Boot a trust domain until it needs keys.

    Raises `FormatError` if its VM or its app-compose is invalid; a platform that only this domain named is not added.
    """
    guest_release = context.release_of(spec.release)
    image = _image(context, spec, guest_release)
    mr_config_id = None if spec.mr_config_id is None else decode_hex(spec.mr_config_id)
    with context.intel.platform_for(spec.platform_name) as platform:
        domain = TrustDomain(
            platform,
            image,
            _compose(context, spec),
            instance_seed=instance_seed(context.seed, spec.instance or spec.name),
            vm_config=image.vm_config(spec.cpu_count, spec.memory_size),
            app_id=None if spec.app_id is None else decode_hex(spec.app_id),
            settings=DomainSettings(spec.debug, mr_config_id, spec.quote_version),
            user_config=spec.user_config,
            release=guest_release,
        )
        domain.boot()
        for event in spec.events:
            (domain.measure if event.measured else domain.claim)(event.event, decode_hex(event.payload))
    return domain


def _compose(context: StackContext, spec: GuestSpec) -> AppCompose:
    if spec.compose is not None:
        return AppCompose(spec.compose)
    return AppCompose.named(spec.name, gateway_enabled=context.joins_gateway(spec.name))


def _image(context: StackContext, spec: GuestSpec, guest_release: Release) -> OsImage:
    """Return the image that a description names: another one, another version of the stack's own, or that itself."""
    own = context.image
    if spec.image is None and spec.image_version in (None, own.version):
        return own
    if spec.image is None and context.config.image_dir is not None:
        raise FormatError(
            f"image_version: the stack boots the image of a folder, of version {own.version}; "
            f"for version {spec.image_version} name an image too"
        )
    version = spec.image_version or guest_release.version
    return OsImage.from_seed(context.seed.derive, spec.image or own.name, version)
