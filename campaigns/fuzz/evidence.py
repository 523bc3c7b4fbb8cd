"""Targets: evidence, certificates, collateral, images, and the encodings that they are made of."""

import json
from typing import Final

from campaigns.fuzz.target import Target, Tried, selected, table, text_of, wide_text_of
from dstack_emu.attest import attestation, certificate, collateral, der, eventlog, image, os_image, scale, strict_json
from dstack_emu.attest.app_compose import AppManifest
from dstack_emu.attest.app_info import AppInfo, decode_app_info, vm_config_of
from dstack_emu.attest.attestation import Attestation
from dstack_emu.attest.csr import SigningRequest, parse_request
from dstack_emu.attest.encrypted_env import open_sealed, parse_env, plain_env, seal
from dstack_emu.attest.errors import AttestError
from dstack_emu.attest.eth_address import decode_address, encode_address
from dstack_emu.attest.eventlog import TdxEvent
from dstack_emu.attest.hexadecimal import decode_hex
from dstack_emu.attest.json_struct import parse_json
from dstack_emu.attest.kdf import load_p256_pem, pkcs8_pem
from dstack_emu.attest.mr_config import MrConfigDocument
from dstack_emu.attest.msgpack_struct import unpack
from dstack_emu.attest.pck import PckExtension, pck_extension_of
from dstack_emu.attest.pcs import Document
from dstack_emu.attest.quote import Quote
from dstack_emu.attest.release import RELEASES
from dstack_emu.attest.semver import Version, VersionRequirement
from dstack_emu.attest.signature import k256_verify, recover
from dstack_emu.attest.varint import read_varint
from dstack_emu.attest.verify import require_bound_to_key, verify_attestation, verify_quote
from dstack_emu.attest.vmconfig import VmConfig
from tests import evidence_samples as samples
from tests.evidence_samples import NOW, world

_SECRET: Final = bytes(range(32))
_VERSION: Final = Version.parse("0.6.0")


def _use_log(tried: Tried, log: tuple[TdxEvent, ...]) -> None:
    tried(lambda: eventlog.log_to_json(log).encode())
    tried(lambda: [eventlog.replay_register(log, imr) for imr in range(4)])
    tried(lambda: eventlog.validate_preimages(log))
    tried(lambda: eventlog.log_to_json(eventlog.strip(log)))
    tried(lambda: eventlog.log_to_json(eventlog.for_get_quote(log)))


def _use_evidence(tried: Tried, evidence: Attestation) -> None:
    _use_log(tried, evidence.event_log)
    tried(evidence.encode)
    tried(lambda: evidence.stripped().encode())
    tried(lambda: evidence.as_v1().encode())
    tried(lambda: decode_app_info(evidence).encode())
    tried(lambda: decode_app_info(evidence, boot_time=True))
    tried(lambda: require_bound_to_key(evidence, world().spki))


def _quote(data: bytes) -> object:
    tried = Tried()
    tried(lambda: Quote.parse(data).encode())
    tried(lambda: collateral.CollateralKey.of_quote(data))
    return tried


def _verify_quote(data: bytes) -> object:
    return repr(verify_quote(data, world().collateral, world().anchor, NOW))


def _attestation(data: bytes) -> object:
    tried, evidence = Tried(), attestation.decode(data)
    _use_evidence(tried, evidence)
    return tried


def _verify_attestation(data: bytes) -> object:
    return verify_attestation(attestation.decode(data), world().collateral, world().anchor, NOW).boot_info().to_json()


def _quote_and_log(data: bytes) -> object:
    tried = Tried()
    _use_evidence(tried, attestation.from_quote_and_log(world().evidence.quote, data))
    return tried


def _signing_request(data: bytes) -> object:
    which, rest = selected(data, 2)
    tried, request = Tried(), SigningRequest.parse(rest, which + 1)
    tried(lambda: request.verify_signature(bytes(70)))
    tried(lambda: repr(request.certificate_request(usage="app:custom", app_id=bytes(20)).subject))
    tried(lambda: repr(parse_request(rest, which + 1)))
    _use_evidence(tried, request.attestation)
    return tried


def _event_log(data: bytes) -> object:
    tried = Tried()
    _use_log(tried, eventlog.log_from_json(data))
    return tried


def _certificate(data: bytes) -> object:
    tried, one = Tried(), certificate.load_der(data)
    oids = (certificate.OID_APP_ID, certificate.OID_APP_INFO, certificate.OID_EVENT_LOG)
    tried(lambda: certificate.certificate_spki(one))
    tried(lambda: certificate.spki_of_der(data))
    tried(lambda: certificate.usage_of(one))
    tried(lambda: certificate.app_id_of(one))
    tried(lambda: certificate.app_info_of(one))
    tried(lambda: pck_extension_of(one))
    tried(lambda: [certificate.extension_payload(one, oid) for oid in oids])
    tried(lambda: _evidence_of(tried, certificate.attestation_of(one)))
    return tried


def _evidence_of(tried: Tried, evidence: Attestation | None) -> None:
    if evidence is not None:
        _use_evidence(tried, evidence)


_EXTENSIONS: Final = (
    certificate.OID_ATTESTATION,
    certificate.OID_TDX_QUOTE,
    certificate.OID_EVENT_LOG,
    certificate.OID_APP_ID,
    certificate.OID_APP_INFO,
)


def _extension(data: bytes) -> object:
    which, value = selected(data, len(_EXTENSIONS))
    base = samples.legacy_certificate() if which in (1, 2) else samples.issued()
    values = {each.oid: each.value.public_bytes() for each in base.extensions if each.oid in _EXTENSIONS}
    one = samples.with_extensions({**values, _EXTENSIONS[which]: value})
    tried = Tried()
    tried(lambda: certificate.app_id_of(one))
    tried(lambda: certificate.app_info_of(one))
    tried(lambda: _evidence_of(tried, certificate.attestation_of(one)))
    return tried


def _extensions() -> list[bytes]:
    found = []
    for base in (samples.issued(), samples.legacy_certificate()):
        for each in base.extensions:
            if each.oid in _EXTENSIONS:
                found.append(bytes([_EXTENSIONS.index(each.oid)]) + each.value.public_bytes())
    return found


def _collateral(data: bytes) -> object:
    which, body = selected(data, 4)
    documents = list(world().documents)
    documents[which] = Document(body, documents[which].issuer_chain)
    assembled = collateral.assemble(*documents)
    return collateral.earliest_expiry(assembled)


def _issuer_chain(data: bytes) -> object:
    documents = list(world().documents)
    documents[1] = Document(documents[1].body, data.decode("latin-1"))
    return collateral.earliest_expiry(collateral.assemble(*documents))


def _verify_collateral(data: bytes) -> object:
    which, body = selected(data, 4)
    documents = list(world().documents)
    documents[which] = Document(body, documents[which].issuer_chain)
    return repr(verify_quote(world().evidence.quote, collateral.assemble(*documents), world().anchor, NOW))


def _vm_config(data: bytes) -> object:
    tried, text = Tried(), wide_text_of(data)
    tried(lambda: vm_config_of(text))
    tried(lambda: VmConfig.parse(text).to_json().encode())
    config = tried(lambda: os_image.decode_vm_config(text))
    if isinstance(config, VmConfig):
        tried(lambda: os_image.cache_key(config))
        tried(lambda: os_image.lite_measurement(config))
        if (document := config.tdx_measurement) is not None:
            tried(lambda: image.sha256sum_entry(document.checksum_file, image.MEASUREMENT_FILE))
            tried(lambda: image.measure(image.ImageMeasurement.decode(document.measurement), config, _ACPI))
    return tried


_ACPI: Final = (bytes(48), bytes(48), bytes(48))


def _measurement(data: bytes) -> object:
    found = image.ImageMeasurement.decode(data)
    tried = Tried()
    tried(found.encode)
    tried(lambda: image.measure(found, world().domain.vm_config, _ACPI))
    return tried


def _td_hob(data: bytes) -> object:
    tried, witness = Tried(), image.TdHobWitness.parse(data)
    for size in (0, 2 << 30, 4 << 30):
        tried(lambda size=size: witness.td_hob(size))  # type: ignore[misc]
    return tried


def _image_files(data: bytes) -> object:
    tried = Tried()
    tried(lambda: os_image.parse_manifest(data))
    tried(lambda: os_image.ImageInfo.parse(data))
    tried(lambda: os_image.decode_cache_entry(data))
    tried(lambda: image.sha256sum_entry(data, image.MEASUREMENT_FILE))
    tried(lambda: image.kernel_authenticode(data, 1000))
    return tried


def _image_samples() -> list[bytes]:
    domain = world().domain
    registers = image.measure(domain.image.measurement, domain.vm_config, _ACPI)
    return [*list(domain.image.files.values())[:4], os_image.encode_cache_entry(registers)]


def _app_compose(data: bytes) -> object:
    which, rest = selected(data, len(RELEASES))
    manifest = AppManifest.parse(text_of(rest), list(RELEASES.values())[which])
    return manifest.compose_hash, manifest.init_script_hashes, manifest


def _composes() -> list[bytes]:
    full = {
        "manifest_version": "3",
        "name": "app",
        "runner": "docker-compose",
        "docker_compose_file": "services: {}",
        "kms_enabled": True,
        "gateway_enabled": True,
        "public_logs": False,
        "local_key_provider_enabled": False,
        "key_provider": "kms",
        "key_provider_id": "00",
        "allowed_envs": ["A"],
        "no_instance_id": False,
        "secure_time": True,
        "storage_fs": "zfs",
        "swap_size": 1,
        "init_script": ["true"],
        "pre_launch_script": "true",
        "launch_token_hash": "00" * 32,
        "event_log_version": 2,
        "port_policy": {"restrict_mode": True, "ports": [{"port": 80, "pp": True}]},
        "requirements": {"os_version": ">=0.5.3, <1.0", "platforms": ["dstack-tdx"], "health_check": True},
        "verity_volumes": [{"source": "a.img", "target": "/a", "verity_root": "00" * 32}],
        "gpu_policy": {"attest_mode": "none"},
    }
    texts = [world().domain.manifest.text, json.dumps(full)]
    return [bytes([number]) + text.encode() for number in range(len(RELEASES)) for text in texts]


def _environment(data: bytes) -> object:
    which, rest = selected(data, 2)
    return (open_env if which else plain)(rest)


def plain(data: bytes) -> dict[str, str]:
    """Read an environment that was opened."""
    return parse_env(data, ["A", "B", "LONG_NAME"])


def open_env(data: bytes) -> dict[str, str]:
    """Open a sealed environment, and read it."""
    return plain(open_sealed(data, _SECRET))


def _environments() -> list[bytes]:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    text = plain_env({"A": "1", "LONG_NAME": "ü"})
    public = X25519PrivateKey.from_private_bytes(_SECRET).public_key().public_bytes_raw()
    return [b"\0" + text, b"\1" + seal(text, public, bytes(44)), b'\0{"env":[{"key":"A","value":"\\ud800"}]}']


def _versions(data: bytes) -> object:
    tried, text = Tried(), text_of(data)
    tried(lambda: Version.parse(text))
    requirement = tried(lambda: VersionRequirement.parse(text))
    if isinstance(requirement, VersionRequirement):
        tried(lambda: requirement.admits(_VERSION))
    return tried


def _keys(data: bytes) -> object:
    tried = Tried()
    tried(lambda: certificate.certificate_spki(certificate.load_pem(text_of(data), "certificate")))
    tried(lambda: certificate.spki_der(certificate.load_spki(data)))
    tried(lambda: certificate.spki_der(certificate.verification_key(data)))
    tried(lambda: pkcs8_pem(load_p256_pem(text_of(data), "key")))
    tried(lambda: recover(data, b"message"))
    tried(lambda: k256_verify(data[:33], data[33:], b"message"))
    return tried


def _key_samples() -> list[bytes]:
    w = world()
    return [w.spki, pkcs8_pem(w.key).encode(), certificate.pem(samples.issued()).encode(), bytes(97), bytes(65)]


def _scale(data: bytes) -> object:
    tried = Tried()
    for read in ("compact", "vec", "text", "boolean", "u32", "u64"):
        tried(lambda read=read: getattr(scale.Decoder(data), read)("it"))  # type: ignore[misc]
    decoder = scale.Decoder(data)
    tried(lambda: decoder.many(lambda: decoder.option(decoder.text, "it"), "all", 100))
    return tried


def _encodings(data: bytes) -> object:
    tried = Tried((AttestError, ValueError, EOFError, OverflowError))  # each reader documents its own
    tried(lambda: read_varint(data, 0, len(data)))
    tried(lambda: der.read(data, der.SEQUENCE, "it"))
    tried(lambda: der.span(data, 0, "it"))
    tried(lambda: der.read_octet_string(data, "it"))
    tried(lambda: decode_hex(text_of(data)))
    tried(lambda: encode_address(decode_address(text_of(data))))
    return tried


def _json(data: bytes) -> object:
    tried = Tried((AttestError, ValueError))  # both readers document ValueError
    tried(lambda: strict_json.read_json(data))
    tried(lambda: parse_json(wide_text_of(data)))
    return tried


def _msgpack_samples() -> list[bytes]:
    return [form for form in samples.attestations() if form[0] >= 0x80]


TARGETS: Final = table(
    Target("quote", _quote, samples.quotes),
    Target("quote-verified", _verify_quote, samples.quotes, weight=0.05),
    Target("attestation", _attestation, samples.attestations, weight=2, growth=256),
    Target("attestation-verified", _verify_attestation, samples.attestations, weight=0.05),
    Target("quote-and-log", _quote_and_log, lambda: [_log()], growth=256),
    Target("signing-request", _signing_request, lambda: _signing_requests(), growth=256),
    Target("event-log", _event_log, lambda: [_log()], weight=2, growth=256),
    Target("certificate", _certificate, samples.certificates, weight=2, growth=256),
    Target("extension", _extension, _extensions, weight=0.1, growth=256),
    Target("collateral", _collateral, lambda: _documents(), weight=0.5),
    Target("issuer-chain", _issuer_chain, lambda: [world().documents[1].issuer_chain.encode()], weight=0.3),
    Target("collateral-verified", _verify_collateral, lambda: _documents(), weight=0.05),
    Target("pck-extension", lambda data: PckExtension.parse(data).encode(), lambda: [_pck()]),
    Target(
        "app-info", lambda data: AppInfo.decode(data).encode(), lambda: [decode_app_info(world().evidence).encode()]
    ),
    Target("vm-config", _vm_config, lambda: [world().domain.vm_config_json.encode()], weight=2, growth=256),
    Target("mr-config", lambda data: MrConfigDocument.parse(wide_text_of(data)), lambda: _mr_configs()),
    Target("measurement", _measurement, lambda: [world().domain.image.measurement.encode()]),
    Target("td-hob", _td_hob, lambda: [world().domain.image.measurement.td_hob], growth=4096),
    Target("image-files", _image_files, _image_samples),
    Target("app-compose", _app_compose, _composes, weight=2, growth=256),
    Target("environment", _environment, _environments),
    Target("versions", _versions, lambda: [b"0.6.0", b">=0.5.3, <1.0.0-rc.1+b", b"^1.2.*", b"~1", b"*"]),
    Target("keys", _keys, _key_samples, weight=0.5),
    Target("scale", _scale, lambda: [b"\4\1\4a", b"\0\1\2\3\4\5\6\7", bytes([2, 0, 1, 0])]),
    Target(
        "encodings", _encodings, lambda: [b"\x30\3\2\1\1", b"\x80\1", b"0x" + b"aB" * 20, b"\4\x82\1\0" + bytes(256)]
    ),
    Target("strict-json", _json, lambda: [b'{"a":[1,2.5,true,null,"\\u0000"],"b":{}}', _log()]),
    Target("msgpack", unpack, _msgpack_samples, growth=256),
)


def _log() -> bytes:
    return eventlog.log_to_json(world().evidence.event_log).encode()


def _signing_requests() -> list[bytes]:
    second = [samples.signing_request(each).encoded for each in (None, samples.pod(world().evidence))]
    return [b"\0" + each for each in samples.signing_requests_v1()] + [b"\1" + each for each in second]


def _documents() -> list[bytes]:
    return [bytes([number]) + document.body for number, document in enumerate(world().documents)]


def _pck() -> bytes:
    return pck_extension_of(world().domain.platform.pck_certificate).encode()


def _mr_configs() -> list[bytes]:
    document = {
        "version": 3,
        "app_id": "00" * 20,
        "compose_hash": "00" * 32,
        "instance_id": "00" * 20,
        "key_provider": "kms",
        "key_provider_id": "00",
        "init_script_hashes": ["00" * 32],
    }
    return [json.dumps(document).encode()]
