"""The speed at which the library creates evidence: a TD report signed as a quote, with log and configuration.

The reference is two ECDSA P-256 signatures: one is necessary, the time of the other is allowed for everything else.
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
    """Measure quotes per second on one core, and their ratio to pairs of bare signatures."""
    domain, counter = booted_domain()[1], itertools.count()
    key, algorithm = ec.generate_private_key(ec.SECP256R1()), ec.ECDSA(hashes.SHA256(), deterministic_signing=True)
    signed = bytes(632)  # the length of the signed part of a quote

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
    """Return a trust domain as it is while an app runs in it, and the vendor of its platform."""
    seed = Seed.of("bench")
    intel = Intel(seed)
    domain = TrustDomain(
        intel.platform("bench"), OsImage.from_seed(seed.derive), AppCompose.named("bench"), instance_seed=bytes(32)
    )
    domain.boot()
    domain.complete(KeyProvider("none"))
    return intel, domain
