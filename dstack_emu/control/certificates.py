"""Certificates of a stack as JSON, as `dstack-emu inspect` describes them. Keys are never read."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dstack_emu.control.schemas import ControlError, unknown


def decoded_certificates(paths: Iterable[Path]) -> dict[str, Any]:
    """Decode the certificates in PEM files that exist, by the file's name; further ones of a file are numbered from 2.

    Raises `ControlError` if a file is not of certificates.
    """
    # Imported here, because a stack whose certificates nobody looks at starts sooner without it.
    from cryptography.x509 import load_pem_x509_certificates

    from dstack_emu.inspection.certificate_fields import describe_certificate
    from dstack_emu.inspection.description import as_json

    decoded: dict[str, Any] = {}
    for path in paths:
        try:
            chain = load_pem_x509_certificates(path.read_bytes())
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise ControlError(f"{path} cannot be read as certificates: {error}", 409) from error
        for index, certificate in enumerate(chain, 1):
            name = path.name if index == 1 else f"{path.name}, {index}"
            decoded[name] = as_json(describe_certificate(certificate))
    return decoded


def certificate_pem(paths: Sequence[Path], name: str) -> dict[str, str]:
    """Return the certificates in one of the files, and nothing else that is in it, as PEM.

    Raises `ControlError` if there is no file of that name, or if it is not of certificates.
    """
    from cryptography.hazmat.primitives.serialization import Encoding
    from cryptography.x509 import load_pem_x509_certificates

    known = {path.name: path for path in paths if path.exists()}
    if name not in known:
        raise unknown("certificate", name, known)
    try:
        chain = load_pem_x509_certificates(known[name].read_bytes())
    except (OSError, ValueError) as error:
        raise ControlError(f"{known[name]} cannot be read as certificates: {error}", 409) from error
    return {"name": name, "pem": "".join(one.public_bytes(Encoding.PEM).decode() for one in chain)}
