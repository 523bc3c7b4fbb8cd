"""To which root the certificate chain of a quote leads, whoever signed what. Nothing is verified here."""

from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from dstack_emu.attest.certificate import UNREADABLE
from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.quote import Quote
from dstack_emu.inspection.certificate_fields import is_emulated, name_of


@dataclass(frozen=True, slots=True)
class NamedRoot:
    """The last certificate of a quote's chain, in DER, and its subject. `is_intels` is what it says of itself."""

    der: bytes
    name: str
    is_intels: bool


def root_of_quote(quote: bytes) -> NamedRoot | None:
    """Return the last certificate of a quote's chain; None if it cannot be read."""
    try:
        root = x509.load_pem_x509_certificates(Quote.parse(quote).signature.pck_chain)[-1]
        name = name_of(root, "subject")
    except (FormatError, *UNREADABLE):
        return None
    return NamedRoot(root.public_bytes(Encoding.DER), name, "Intel SGX Root CA" in name and not is_emulated(root))
