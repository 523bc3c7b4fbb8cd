"""What differs between the dstack releases that this emulator is taken for: one table, one field for each difference.

Code is given a `Release` and reads its fields; nothing compares the name of a release. What is equal in all of them
stands in the code that does it, not here.

Source: dstack 40eaf35e (0.5.11) and 312dc605 (branch next, whose recorded answers are what "0.5" answers); release
0.6.0 of 2026-09-28 and its newest public sources before it. "0.6" has one rule of 0.6.1: `vm_config_must_match`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.version import REVISION

MrConfigVersion = Literal[1, 2, 3]
AuthContract = Literal["readme", "0.6"]
AuthEthRevision = Literal["0.5.11", "next"]


@dataclass(frozen=True, slots=True)
class Release:
    """One release line of dstack, by all in which it differs from the others."""

    name: str
    """How users name it: `0.5`, `0.6`."""
    version: str
    """What Version, User-Agent and X-App-Version say."""

    # RPC, of every service.
    unknown_method_status: Literal[400, 404]
    """HTTP status for a method that a mount does not have."""
    oversize_status: Literal[400, 413]
    """HTTP status for a body over the limit."""

    # The guest agent.
    guest_api_v1: bool
    """Serves dstack.guest.v1 at `/v1` and `/prpc/v1`, Worker.Health among it, and the frozen API at `/v0` too."""
    v0_methods: Mapping[str, frozenset[str]]
    """The methods of the frozen services DstackGuest, Tappd and Worker."""
    emit_event_removed: bool
    """EmitEvent is answered with its removal, and measures nothing."""
    get_quote_has_attestation: bool
    """GetQuote's answer has the versioned attestation, too."""
    attests_key_of_prehashed: bool
    """GetAttestationForAppKey takes secp256k1_prehashed as the name of the key secp256k1."""

    # Evidence.
    certificate_log_has_digests: bool
    """The event log in a certificate keeps the digests of runtime events."""

    # Boot.
    measures_kms: bool
    """The event `mr-kms` comes before `os-image-hash`."""
    measures_init_scripts: bool
    """One event `init-script-hash` for each init script, after `compose-hash`."""
    measures_gpu_policy: bool
    """The event `gpu-policy-hash` before `instance-id`, with or without a GPU."""
    measures_storage_encryption: bool
    """The event `storage-encrypted` after `storage-fs`. A capture of 0.6.0 does not have it; later sources do."""
    app_id_is_compose_hash_without_kms: bool
    """A guest without a KMS has the first 20 bytes of its compose hash as app id, whatever its instance info is."""
    mr_config_id_versions: frozenset[MrConfigVersion]
    """The forms of mr_config_id that a guest accepts, beside the one that is all zero."""
    pinned_mr_config_id_version: MrConfigVersion
    """The form that a domain is launched with if none is given and its app has a key_provider_id; 1 for other apps."""
    manifest_version_is_text: bool
    """manifest_version may be text, and only 1 and 2 may be numbers; otherwise it is any number of 32 bits."""
    max_manifest_version: int | None
    """The highest manifest version that a guest boots; None if it checks none."""
    manifest_3_members: bool
    """Reads init_script, snapshotter, event_log_version, requirements and verity_volumes of an app-compose."""
    measurement_documents: tuple[int, ...]
    """The versions of an image's measurement document that a KMS and a verifier read."""
    tpm_key_provider: bool
    """The key provider `tpm` exists."""
    reports_every_kms: bool
    """If no KMS gives keys, the error has the answer of each URL; otherwise the first one's alone."""
    verifies_usage_of_issuer: bool
    """A guest requires the usage kms:rpc of a KMS that signs its certificates, and not only of one that gives keys."""
    refuses_encrypted_env_without_key: bool
    """An encrypted environment that cannot be decrypted for want of a key ends the boot."""
    strict_pre_launch_script: bool
    """A command of the pre-launch script that fails ends the launch."""

    gateway_failure_ends_boot: bool
    """A guest that no gateway registers does not boot; otherwise it boots without, reports it, and tries again."""
    keeps_gateway_keys_before_registration: bool
    """Keys and certificates for gateways are kept as soon as they are made; otherwise once a gateway has answered."""

    # The KMS.
    any_client_certificate_issuer: bool
    """A client certificate needs evidence and no particular issuer; otherwise the temporary CA must have issued it."""
    get_meta_has_os_image_verification: bool
    """GetMeta says whether OS images are verified."""
    attestation_mode_alias: bool
    """GetAttestationInfo has the member attestation_mode beside tee_variant in JSON."""
    core_pccs_url: bool
    """kms.toml knows core.pccs_url, the older name of core.attestation.urls.pccs."""
    clear_image_cache_with_token: bool
    """The main listener has ClearImageCache if core.admin_token_hash is set."""
    admin_get_kms_key: bool
    """The admin listener has GetKmsKey."""
    public_key_handover_option: bool
    """core.onboard.public_key_handover may refuse GetKmsKey on the main listener."""
    substitutes_own_image_for_legacy_source_alone: bool
    """A receiver of root keys substitutes its own OS image for a source that names none only if the source's evidence
    has no VM config at all, as evidence in legacy extensions; otherwise for any source that names none."""
    onboard_token: bool
    """core.onboard may require a token or a user, and OnboardRequest has a source_token."""
    auth_api_cache_seconds: int
    """How long a successful self check and GetMeta's info are used again; with 0 neither is kept."""
    certificate_app_info_is_verified: bool
    """SignCert writes app info from the verified identity: the true device id, the authorized OS image hash."""
    refuses_reversed_validity: bool
    """SignCert refuses a certificate that would end before it begins; GetTlsKey does in every release."""
    vm_config_must_match: bool
    """A request's vm_config has to equal the one in the attestation; otherwise it takes its place."""
    lite_acpi_tables_verified: bool
    """A verifier says of the lite variant, too, that ACPI tables were verified."""

    # The gateway.
    gateway_admin_needs_credential: bool
    """The admin listener starts only with a token, an htpasswd file or insecure_no_auth; otherwise anyone may call."""
    gateway_checks_keys: bool
    """RegisterCvm wants a WireGuard key of 32 bytes that no other instance has, and an instance of the same app."""
    gateway_v05_messages: bool
    """Its messages are those of gateway_v05.proto, without health and rotation of instances."""
    gateway_rotates_instances: bool
    """An app id means only instances that an operator left in rotation and whose health, if their app asks for it, is
    good; instances and nodes can be removed, and the admin listener has metrics."""
    gateway_refuses_ports: bool
    """RegisterCvm refuses the ports 0 and above 65535 in a policy; otherwise it leaves out those above."""
    gateway_leaves_out_stale_instances: bool
    """An app id means only instances with a handshake younger than core.proxy.timeouts.handshake_stale."""
    gateway_normalizes_domains: bool
    """A domain is one in any case, with `*.` and a final dot; it must be a DNS name, and its port must not be 0."""
    gateway_checks_dns_times: bool
    """CreateDnsCredential refuses dns_txt_ttl and max_dns_wait that are 0."""
    gateway_checks_peer_urls: bool
    """SetNodeUrl wants an http(s) URL with a host and without credentials."""
    gateway_manages_acme_account: bool
    """SetCaa is implemented, RotateAcmeCredentials exists, and a changed ACME URL needs the latter."""
    gateway_exit_reads_request: bool
    """Exit has a request, and refuses one that does not decode."""
    gateway_static_certificate: bool
    """core.proxy.base_domain, cert_chain and cert_key are a certificate beside those of domains."""
    gateway_localhost_key_in_debug: bool
    """core.debug.insecure_localhost_backend makes `localhost` an app id; core.proxy.localhost_enabled otherwise."""
    gateway_limits_writes: bool
    """core.proxy.timeouts.write ends a connection whose receiver takes nothing; otherwise only the idle time does."""

    # The VMM.
    vmm_v05_messages: bool
    """Its messages are those of vmm_v05.proto, without network lists, interfaces and simulated TEEs; it has
    ReportDhcpLease."""
    vmm_guards_every_route: bool
    """With `auth` on, every route asks for a credential, of a token or a user; otherwise `/logs` alone, for a token as
    Bearer."""
    vmm_log_errors_have_status: bool
    """`/logs` answers 404 for an unknown machine, and 400 for an unknown channel; otherwise 200, with the text."""
    vmm_checks_port_conflicts: bool
    """Two machines, or one, cannot map a host port twice."""
    vmm_checks_resources: bool
    """A resize needs a change, numbers above zero, and a name of an image."""
    vmm_checks_network_modes: bool
    """A network mode that a request cannot have is refused; otherwise one that is unknown means the default."""
    vmm_restarts_with_backoff: bool
    """Machines that ended by themselves are started again after growing pauses, and a limited number of times;
    otherwise each time that the VMM looks."""
    vmm_tells_collateral_urls: bool
    """.sys-config.json has `collateral_urls` beside `pccs_url`."""
    vmm_rotates_logs: bool
    """A log begins anew at each start and above a size, and earlier ones are kept; otherwise serial.log alone begins
    anew, at each start, and what it had goes to serial.history.log."""

    # Webhooks.
    identity_widths_are_checked: bool
    """A KMS sends its webhook no compose hash that is not 32 bytes, nor an instance id of neither 20 nor 0."""
    boot_info_variant_members: tuple[str, ...]
    """The members of the webhook's request that name the TEE variant."""
    auth_contract: AuthContract
    """The contract of auth-simple by default."""
    auth_eth_revision: AuthEthRevision
    """The revision of auth-eth-bun by default."""

    @property
    def revision(self) -> str:
        """Return what is in the place of dstack's git revision."""
        return REVISION


_V0_METHODS: Final = frozenset(
    ("GetTlsKey", "GetKey", "GetQuote", "Attest", "EmitEvent", "Info", "Sign", "Verify", "Version")
)
_TAPPD_METHODS: Final = frozenset(("DeriveKey", "DeriveK256Key", "TdxQuote", "RawQuote", "Info", "Version"))
_WORKER_METHODS: Final = frozenset(("Info", "Version", "GetAttestationForAppKey"))

_0_5: Final = Release(
    name="0.5",
    version="0.5.11",
    unknown_method_status=400,
    oversize_status=400,
    guest_api_v1=False,
    v0_methods=MappingProxyType(
        {"DstackGuest": _V0_METHODS | {"GpuInfo"}, "Tappd": _TAPPD_METHODS, "Worker": _WORKER_METHODS}
    ),
    emit_event_removed=False,
    get_quote_has_attestation=True,
    attests_key_of_prehashed=False,
    certificate_log_has_digests=False,
    measures_kms=True,
    measures_init_scripts=False,
    measures_gpu_policy=False,
    measures_storage_encryption=False,
    app_id_is_compose_hash_without_kms=True,
    mr_config_id_versions=frozenset((1, 2)),
    pinned_mr_config_id_version=2,
    manifest_version_is_text=False,
    max_manifest_version=None,
    manifest_3_members=False,
    measurement_documents=(3,),
    tpm_key_provider=False,
    reports_every_kms=False,
    verifies_usage_of_issuer=False,
    refuses_encrypted_env_without_key=False,
    strict_pre_launch_script=False,
    gateway_failure_ends_boot=True,
    keeps_gateway_keys_before_registration=False,
    any_client_certificate_issuer=False,
    get_meta_has_os_image_verification=False,
    attestation_mode_alias=True,
    core_pccs_url=True,
    clear_image_cache_with_token=True,
    admin_get_kms_key=False,
    public_key_handover_option=False,
    substitutes_own_image_for_legacy_source_alone=False,
    onboard_token=False,
    auth_api_cache_seconds=0,
    certificate_app_info_is_verified=False,
    refuses_reversed_validity=False,
    vm_config_must_match=False,
    lite_acpi_tables_verified=False,
    gateway_admin_needs_credential=False,
    gateway_checks_keys=False,
    gateway_v05_messages=True,
    gateway_rotates_instances=False,
    gateway_refuses_ports=False,
    gateway_leaves_out_stale_instances=False,
    gateway_normalizes_domains=False,
    gateway_checks_dns_times=False,
    gateway_checks_peer_urls=False,
    gateway_manages_acme_account=False,
    gateway_exit_reads_request=False,
    gateway_static_certificate=False,
    gateway_localhost_key_in_debug=False,
    gateway_limits_writes=True,
    vmm_v05_messages=True,
    vmm_guards_every_route=False,
    vmm_log_errors_have_status=False,
    vmm_checks_port_conflicts=False,
    vmm_checks_resources=False,
    vmm_checks_network_modes=False,
    vmm_restarts_with_backoff=False,
    vmm_tells_collateral_urls=False,
    vmm_rotates_logs=False,
    identity_widths_are_checked=False,
    boot_info_variant_members=("teeVariant", "attestationMode"),
    auth_contract="readme",
    auth_eth_revision="0.5.11",
)

_0_6: Final = Release(
    name="0.6",
    version="0.6.0",
    unknown_method_status=404,
    oversize_status=413,
    guest_api_v1=True,
    v0_methods=MappingProxyType({"DstackGuest": _V0_METHODS, "Tappd": _TAPPD_METHODS, "Worker": _WORKER_METHODS}),
    emit_event_removed=True,
    get_quote_has_attestation=False,
    attests_key_of_prehashed=True,
    certificate_log_has_digests=True,
    measures_kms=False,
    measures_init_scripts=True,
    measures_gpu_policy=True,
    measures_storage_encryption=False,
    app_id_is_compose_hash_without_kms=False,
    mr_config_id_versions=frozenset((1, 2, 3)),
    pinned_mr_config_id_version=3,
    manifest_version_is_text=True,
    max_manifest_version=3,
    manifest_3_members=True,
    measurement_documents=(3, 4),
    tpm_key_provider=True,
    reports_every_kms=True,
    verifies_usage_of_issuer=True,
    refuses_encrypted_env_without_key=True,
    strict_pre_launch_script=True,
    gateway_failure_ends_boot=False,
    keeps_gateway_keys_before_registration=True,
    any_client_certificate_issuer=True,
    get_meta_has_os_image_verification=True,
    attestation_mode_alias=False,
    core_pccs_url=False,
    clear_image_cache_with_token=False,
    admin_get_kms_key=True,
    public_key_handover_option=True,
    substitutes_own_image_for_legacy_source_alone=True,
    onboard_token=True,
    auth_api_cache_seconds=1,
    certificate_app_info_is_verified=True,
    refuses_reversed_validity=True,
    vm_config_must_match=True,
    lite_acpi_tables_verified=True,
    gateway_admin_needs_credential=True,
    gateway_checks_keys=True,
    gateway_v05_messages=False,
    gateway_rotates_instances=True,
    gateway_refuses_ports=True,
    gateway_leaves_out_stale_instances=True,
    gateway_normalizes_domains=True,
    gateway_checks_dns_times=True,
    gateway_checks_peer_urls=True,
    gateway_manages_acme_account=True,
    gateway_exit_reads_request=True,
    gateway_static_certificate=True,
    gateway_localhost_key_in_debug=True,
    gateway_limits_writes=False,
    vmm_v05_messages=False,
    vmm_guards_every_route=True,
    vmm_log_errors_have_status=True,
    vmm_checks_port_conflicts=True,
    vmm_checks_resources=True,
    vmm_checks_network_modes=True,
    vmm_restarts_with_backoff=True,
    vmm_tells_collateral_urls=True,
    vmm_rotates_logs=True,
    identity_widths_are_checked=True,
    boot_info_variant_members=("teeVariant",),
    auth_contract="0.6",
    auth_eth_revision="next",
)

RELEASES: Final[Mapping[str, Release]] = MappingProxyType({each.name: each for each in (_0_5, _0_6)})

DEFAULT: Final = _0_6
"""The release that is meant if none is named."""


def release(name: str) -> Release:
    """Return the release of a name; raise `FormatError`, which lists the names there are, for any other."""
    found = RELEASES.get(name)
    if found is None:
        raise FormatError(f"dstack release: {' or '.join(RELEASES)} expected, got {name!r:.40}")
    return found
