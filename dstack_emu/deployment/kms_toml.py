"""The kms.toml of a KMS in a stack: as a document for our own KMS, as a file for one that is another program.

Its keys are upstream's. An older name of a key is written only for a release that knows no other.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dstack_emu.attest.release import DEFAULT, Release
from dstack_emu.transport.files import replace_file
from dstack_emu.transport.ports import IMAGE_URL
from dstack_emu.transport.settings import merge


@dataclass(frozen=True, slots=True, kw_only=True)
class KmsSettings:
    """What a KMS is configured with: one address for both phases, its folders, and the services that it asks.

    `root_ca` is the root certificate (PEM) under which it verifies quotes. `settings` are further keys of [core], which
    take the place of those made here.
    """

    host: str
    port: int
    cert_dir: Path
    image_cache: Path
    pccs: str
    root_ca: Path
    webhook: str
    site_name: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    release: Release = DEFAULT

    def document(self) -> dict[str, Any]:
        """Return the content of the file."""
        certs, where = self.cert_dir, {"address": self.host, "port": self.port}
        core = {
            "cert_dir": str(certs),
            "site_name": self.site_name,
            **({"pccs_url": self.pccs} if self.release.core_pccs_url else {}),
            "attestation": {
                "insecure_allow_external_trust_anchors": True,
                "urls": {"pccs": self.pccs},
                "root_ca": {"tdx": str(self.root_ca)},
            },
            "image": {"cache_dir": str(self.image_cache), "download_url": IMAGE_URL},
            "auth_api": {"type": "webhook", "webhook": {"url": self.webhook}},
            "onboard": where,
        }
        tls = {
            "key": str(certs / "rpc.key"),
            "certs": str(certs / "rpc.crt"),
            "mutual": {"ca_certs": str(certs / "tmp-ca.crt")},
        }
        return {"rpc": {**where, "tls": tls}, "core": merge(core, dict(self.settings))}

    def write(self, path: Path) -> None:
        """Write the file, and make the folder of the keys; raise `OSError`."""
        self.cert_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        replace_file(path, toml_text(self.document()).encode())


def toml_text(document: Mapping[str, Any]) -> str:
    """Write tables of text, numbers, booleans and lists of these as TOML; keys are bare."""
    return "\n".join(_table(document, ()))


def _table(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    values = {key: value for key, value in table.items() if not isinstance(value, Mapping)}
    lines = [f"[{'.'.join(path)}]"] if path and values else []
    # JSON's text, numbers, booleans and lists are TOML's, except for one character that TOML wants escaped.
    lines += [
        f"{key} = {json.dumps(value, ensure_ascii=False)}".replace("\x7f", "\\u007f") for key, value in values.items()
    ]
    lines += [""] if values else []
    for key, value in table.items():
        if isinstance(value, Mapping):
            lines += _table(value, (*path, key))
    return lines
