"""How fast the library makes evidence: a TD report signed into a quote, put together with log and configuration.

The reference is what it cannot do without: ECDSA P-256 signatures; two of them, so that there is room for all else.
"""

import itertools
from collections.abc import Iterator

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from bench.figure import Bar, Effort, Figure, alternate, median, rate_of, ratio
from bench.processes import SERVER_CORE, on_core
from dstack_emu.simulator.image import OsImage
from dstack_emu.simulator.intel import Intel
from dstack_emu.simulator.seed import Seed
from dstack_emu.simulator.trust_domain import AppCompose, KeyProvider, TrustDomain

BAR = 0.5


def measure(effort: Effort) -> Iterator[Figure]:
    """Quotes a second on one core, and as a share of the rate of two bare signatures."""
    domain, counter = booted_domain()[1], itertools.count()
    key, algorithm = ec.generate_private_key(ec.SECP256R1()), ec.ECDSA(hashes.SHA256(), deterministic_signing=True)
    signed = bytes(632)  # as long as what a quote signs

    def quote() -> None:
        domain.attest(next(counter).to_bytes(64, "big"))

    def two_signatures() -> None:
        key.sign(signed, algorithm)
        key.sign(signed, algorithm)

    with on_core(SERVER_CORE):
        quotes, bare = alternate(effort, rate_of(quote), rate_of(two_signatures))
    share = ratio(quotes, bare)
    yield Figure("quotes_per_second", median(quotes), "quotes/s", Bar(BAR * median(bare)))
    yield Figure("quotes_to_two_signatures", share, "x two bare signatures", Bar(BAR))


def booted_domain() -> tuple[Intel, TrustDomain]:
    """A trust domain as it is once an app runs in it, and who vouches for its platform."""
    seed = Seed.of("bench")
    intel = Intel(seed)
    domain = TrustDomain(
        intel.platform("bench"), OsImage.from_seed(seed.derive), AppCompose.named("bench"), instance_seed=bytes(32)
    )
    domain.boot()
    domain.complete(KeyProvider("none"))
    return intel, domain
