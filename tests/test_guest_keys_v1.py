"""Keys of the guest API v1 against vectors of upstream's documents and tests, and the claims that vouch for them."""

import pytest

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.guest_keys_v1 import derive_guest_key, recover_claim_signer, sign_claim
from dstack_emu.attest.keccak import keccak
from dstack_emu.attest.signature import K256_ORDER, k256_point

# Of upstream's documents on the guest API v1.
APP_KEY = bytes.fromhex("1a2b3c4d5e6f7a8b9c0d1e2f3a4b5c6d7e8f9a0b1c2d3e4f5a6b7c8d9e0f1a2b")
# Of upstream's simulator, sdk/simulator/appkeys.json.
SIMULATOR_APP_KEY = bytes.fromhex("d6e88992cdeeee35fe70b5db61ab66cdb191fb9b6ec9313757ef162dd7214d5d")

KEYS = [
    (
        APP_KEY,
        "",
        "secp256k1",
        "59f60584ce6fd2a3a31997256db9d77322463fc8a6b1520110401bcb1ee92387",
        "0377c7fb050db181d392266a3cee9adb2901c6d665f11bac68be5457f577ba4908",
    ),
    (
        APP_KEY,
        "",
        "ed25519",
        "b023493030669cf22e9cafa6a464d4cf3ae4edfe5474ec796710f21ea011946d",
        "a3dc149fd5b765eab2eb7d3174fa939e39386898f10b15b7b146f6f1358ecf2a",
    ),
    (
        APP_KEY,
        "storage-encryption",
        "secp256k1",
        "5510330f86902ddae38c6d89c93a8408019332c17a429e1abd01c4a28d1544a6",
        "03d962450a41748021c8b02787ac36ce642ff0ae25f4c55019eb527e1112cfd764",
    ),
    (
        APP_KEY,
        "storage-encryption",
        "ed25519",
        "3c4c3ece12fa99ccb93fc0090877f80e70545fdd971e2ac93d3398c4684538d3",
        "2380c4a33a60b60613fa43866421e5b96eb8dcde211317200fd0d41e7e491288",
    ),
    (
        APP_KEY,
        "wallet",
        "secp256k1",
        "2580611f0f936abe59399a8ac4ed9964d0259bd34c88ea012ca42b32acbf9386",
        "0369cecd3c8da88730f7d45875824c3e75f63a2d3da4be42f45671954daa2abb28",
    ),
    (
        APP_KEY,
        "wallet",
        "ed25519",
        "d76a703b08ebb074b809b9d6acf3d7c6663131273807717ce9d23bbadc2c644e",
        "dade622d0fa1641e79b16e0b04e296be671f85f0aa6387b7d37e9d89f87494f5",
    ),
    (
        APP_KEY,
        "a/b/c",
        "secp256k1",
        "7f0973449298085d2d36a3b4c4d3243c100ba1981ffa885fe9e9dee883e69538",
        "02e9b1a61b6d70aa9b241753828c316bf90e33e77b2e113f9ba75a8b6dc3cde5c1",
    ),
    (
        APP_KEY,
        "k\0:ey",
        "ed25519",
        "42da8bf0b479ed125c370e3b91f982735bf08ff592abbd586985affa43ee96a1",
        "c833107822b003ff5675b33b90b151d4315c3ab9162b17d876e8dffde41abf9b",
    ),
    (
        SIMULATOR_APP_KEY,
        "storage-encryption",
        "secp256k1",
        "b9fa657a9b12a35468341fe9204cad53d393b35f05184546fbc5c329a526cf79",
        "0380a54b49c2ad61341d7ade1f41df5061783f8be45911bed81a8048bed2a60b36",
    ),
    (
        SIMULATOR_APP_KEY,
        "storage-encryption",
        "ed25519",
        "4330ca9a8816f4e2be49b6b1c54a619940d70263429e9efe1fa5c3e269ef2786",
        "ec766df0797ac4be0e85af6cd48cf26c834527ec0156550cbd4e68c9934748b7",
    ),
    (
        SIMULATOR_APP_KEY,
        "",
        "secp256k1",
        "1405a12f0670bad157ae87f2da4f29e531bde7d05ff17a070e5191120557613a",
        "02b3634254d8ec857b5149237c7232c9c9355a3186b20d3e873029f7a161a50284",
    ),
]

CLAIMS = [
    (
        "storage-encryption",
        "6c9686d9a19b7e9c64439fbd6550e6c64edafca30b24c6360b17f72a83690ea1",
        "5b6193729ce7976ec67863f21692d4b98c69832698aae8e001a7d33a6f818b6e"
        "46ca950725b6e90e8ca9bcf394abd03ce264bf9b7eec1e91693247f9dd53c26901",
    ),
    (
        "wallet",
        "1c8cc11de8e47e92f8a495503f678550187815d028109a80d33da4d82c42b700",
        "af26d2f258d34580e7288bd83fc97bddc83769476d77823c4f76a3ad77a75149"
        "1a39ffc4ef3aa66cb0d008b8f6f199e6d57c1da9a92ba4cf10f23bf752b8cad000",
    ),
]


@pytest.mark.parametrize(("app_key", "domain", "algorithm", "key", "public_key"), KEYS)
def test_derived_keys_equal_upstreams_vectors(
    app_key: bytes, domain: str, algorithm: str, key: str, public_key: str
) -> None:
    derived = derive_guest_key(app_key, algorithm, domain)
    assert (derived.key.hex(), derived.public_key.hex()) == (key, public_key)


@pytest.mark.parametrize(("domain", "digest", "signature"), CLAIMS)
def test_claims_and_their_signatures_equal_upstreams_vectors(domain: str, digest: str, signature: str) -> None:
    derived = derive_guest_key(APP_KEY, "secp256k1", domain)
    assert keccak(derived.claim).hex() == digest
    assert sign_claim(APP_KEY, derived).hex() == signature


@pytest.mark.parametrize("algorithm", ["secp256k1", "ed25519"])
def test_claim_signature_recovers_to_the_app_key(algorithm: str) -> None:
    derived = derive_guest_key(APP_KEY, algorithm, "wallet")
    link = sign_claim(APP_KEY, derived)
    assert recover_claim_signer(link, algorithm, "wallet", derived.public_key) == k256_point(APP_KEY)


def test_claim_signature_recovers_to_another_key_for_another_domain() -> None:
    derived = derive_guest_key(APP_KEY, "secp256k1", "wallet")
    link = sign_claim(APP_KEY, derived)
    assert recover_claim_signer(link, "secp256k1", "wallets", derived.public_key) != k256_point(APP_KEY)


@pytest.mark.parametrize(
    ("algorithm", "text"),
    [
        ("", "algorithm is required, use `secp256k1` or `ed25519`"),
        ("k256", "unsupported algorithm `k256`, use `secp256k1` or `ed25519`"),
        ("SECP256K1", "unsupported algorithm `SECP256K1`, use `secp256k1` or `ed25519`"),
        ("secp256k1_prehashed", "unsupported algorithm `secp256k1_prehashed`, use `secp256k1` or `ed25519`"),
        ("rsa", "unsupported algorithm `rsa`, use `secp256k1` or `ed25519`"),
    ],
)
def test_algorithm_that_is_none_of_the_two_is_refused(algorithm: str, text: str) -> None:
    with pytest.raises(FormatError) as refusal:
        derive_guest_key(APP_KEY, algorithm, "wallet")
    assert str(refusal.value) == text


@pytest.mark.parametrize("app_key", [bytes(32), K256_ORDER.to_bytes(32, "big"), b"\xff" * 32])
def test_app_key_that_is_no_scalar_cannot_sign(app_key: bytes) -> None:
    derived = derive_guest_key(app_key, "ed25519", "wallet")
    with pytest.raises(FormatError, match="^the app root k256 key is not a valid secp256k1 scalar$"):
        sign_claim(app_key, derived)
