"""A target: a decoder with what is done with its result, the errors that it documents, and valid inputs."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from dstack_emu.attest.errors import AttestError

Read = Callable[[bytes], object]
"""Decodes an input, and uses the result as its readers do; what it returns must be the same for the same bytes."""


@dataclass(frozen=True)
class Target:
    """What is fuzzed.

    `refusals` are the errors that the decoder documents; any other exception is a finding. `weight` is its share of a
    run's inputs. An answer may have at most `growth` times the characters of the input and 64 KiB more. `dictionary`
    has pieces that a mutation may put in. What `is_of_the_user`, such as a configuration file, may take any time:
    Python's parser of TOML is quadratic, and nobody else writes it.
    """

    name: str
    read: Read
    samples: Callable[[], Iterable[bytes]]
    refusals: tuple[type[Exception], ...] = (AttestError,)
    weight: float = 1.0
    growth: int = 64
    dictionary: tuple[bytes, ...] = ()
    is_of_the_user: bool = False


def table(*targets: Target) -> Mapping[str, Target]:
    """Return targets by their names."""
    return {target.name: target for target in targets}


def text_of(data: bytes) -> str:
    """Return bytes as a text, as it comes from a protobuf message: without lone surrogates."""
    return data.decode(errors="replace")


def wide_text_of(data: bytes) -> str:
    """Return bytes as a text that may have lone surrogates, as it comes from JSON or from a file's name."""
    return data.decode(errors="surrogateescape")


def selected(data: bytes, choices: int) -> tuple[int, bytes]:
    """Return a number below `choices` from the first byte, and the rest."""
    return (data[0] % choices, data[1:]) if data else (0, b"")


@dataclass
class Tried:
    """The results of several readers of one input; a refusal of one does not keep the next from being tried."""

    refusals: tuple[type[Exception], ...] = (AttestError,)
    results: list[object] = field(default_factory=list)

    def __call__(self, read: Callable[[], object]) -> object:
        """Run one, and keep what it returned, or its refusal."""
        try:
            result = read()
        except self.refusals as error:
            self.results.append(f"{type(error).__name__}: {error}")
            return None
        self.results.append(result)
        return result

    def __repr__(self) -> str:
        return repr(self.results)
