"""Self-signed certificates in files, and TLS settings of a server that has one."""

import datetime
import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests import tls


@dataclass(frozen=True)
class Identity:
    """A certificate, and the files that it and its key are in."""

    certificate: x509.Certificate
    cert_file: str
    key_file: str

    @property
    def der(self) -> bytes:
        """The certificate in DER."""
        return self.certificate.public_bytes(Encoding.DER)


def self_signed(folder: Path, name: str, *domains: str) -> Identity:
    """Make a certificate for 127.0.0.1, and for domain names."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    names = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), *map(x509.DNSName, domains)]
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = folder / f"{name}.crt", folder / f"{name}.key"
    cert_file.write_bytes(certificate.public_bytes(Encoding.PEM))
    key_file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return Identity(certificate, str(cert_file), str(key_file))


def server_tls(identity: Identity, *, client_ca: Identity | None = None) -> ssl.SSLContext:
    """Make a server's settings; with `client_ca` clients have to show its certificate."""
    ca = None if client_ca is None else Path(client_ca.cert_file).read_text()
    return tls.server(Path(identity.cert_file).read_text(), Path(identity.key_file).read_text(), client_ca=ca)
