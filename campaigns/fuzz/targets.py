"""All targets, by name."""

from collections.abc import Mapping
from typing import Final

from campaigns.fuzz import evidence, messages, wire
from campaigns.fuzz.target import Target

TARGETS: Final[Mapping[str, Target]] = {**evidence.TARGETS, **messages.TARGETS, **wire.TARGETS}
