"""The files of a separate KMS: a kms.toml on free ports beside a stack, and a stack's keys."""

import shutil
from pathlib import Path

from tests.running import RunningStack


def write_kms_toml(
    folder: Path, stack: RunningStack, *, webhook: str, pccs: str = "", attests: bool = True, port: int = 0
) -> Path:
    """Write the configuration of a KMS that keeps its keys in `folder`/certs, with the root and PCCS of a stack.

    `pccs` names another PCCS; without `attests` its certificate carries no evidence.
    """
    certs, path = folder / "certs", folder / "kms.toml"
    path.write_text(
        f"""
[rpc]
address = "127.0.0.1"
port = {port}
tls = {{ key = "{certs}/rpc.key", certs = "{certs}/rpc.crt", mutual = {{ ca_certs = "{certs}/tmp-ca.crt" }} }}
[core]
cert_dir = "{certs}"
attest_rpc_cert = {str(attests).lower()}
[core.image]
verify = false
[core.attestation]
insecure_allow_external_trust_anchors = true
urls = {{ pccs = "{pccs or stack.services["pccs"]}" }}
root_ca = {{ tdx = "{stack.description["root_ca"]}" }}
[core.auth_api.webhook]
url = "{webhook}"
[core.onboard]
address = "127.0.0.1"
port = {port}
"""
    )
    return path


def copy_keys(folder: Path, stack: RunningStack) -> None:
    """Give a KMS in `folder` the keys of the stack's."""
    shutil.copytree(Path(stack.description["kms_ca"]).parent, folder / "certs")
