"""`linearizability`: clients ask at the same time as others change what is decided; each answer has to fit a moment.

A script has one track for each client and for each operator. The acts of a track run one after another; tracks run at
the same time. `steps` is how often an act lets the others go first.
"""

from random import Random
from typing import Any, Final

from campaigns.case import Act, Campaign, Script
from campaigns.fail_open import Draw
from campaigns.linear_world import LinearWorld

CLIENTS: Final = (("app",), ("twin",), ("wallet",), ("stranger",), ("debug", "liar"))
"""The trust domains of each client; none boots in two tracks at once."""
OPERATORS: Final = 2
EDITS: Final = ("allow", "allow", "deny", "deny", "other-compose", "other-device", "no-image", "empty", "lenient")
LONGEST: Final = 150
"""Steps; an undisturbed boot takes some three hundred."""


class Linearizability:
    """The campaign; with `trusts_cache` false the answers that a KMS keeps for a second count as late."""

    name = "linearizability"
    about = "concurrent calls and changes: each answer fits a moment between its call and its end"

    def __init__(self, *, trusts_cache: bool = True) -> None:
        self._trusts_cache = trusts_cache

    def draw(self, chance: Random) -> Script:
        """Draw a case: which KMS keep answers about themselves, then the tracks."""
        caches = chance.random() < 0.4
        acts = [Act("stack", {"caches": caches}, f"stack: {'with' if caches else 'without'} cache")]
        for number, names in enumerate(CLIENTS):
            for _ in range(chance.randint(1, 4)):
                acts.append(self._call(chance, number, names))
        if chance.random() < 0.5:
            fields = {
                "track": len(CLIENTS),
                "steps": chance.randrange(LONGEST),
                "source": chance.choice(("src", "dst")),
            }
            acts.append(Act("onboard", fields))
        for number in range(OPERATORS):
            for _ in range(chance.randint(2, 8)):
                acts.append(self._change(chance, 10 + number, caches=caches))
        return tuple(acts)

    def _call(self, chance: Random, track: int, names: tuple[str, ...]) -> Act:
        fields: dict[str, Any] = {"track": track, "steps": chance.randrange(LONGEST)}
        kms = chance.choice(("src", "src", "dst"))
        name = chance.choices(("boot", "certificate", "temporary CA"), (5, 3, 4 if track < 2 else 0))[0]
        if name == "temporary CA":
            kms = ("src", "dst")[track]  # from one client each, so that its record in the journal is known
        if name != "temporary CA":
            fields["who"] = chance.choice(names)
        if name != "certificate":
            fields["kms"] = kms
        return Act(name, fields)

    def _change(self, chance: Random, track: int, *, caches: bool) -> Act:
        if caches and chance.random() < 0.3:
            act = Act("clock", {"advance": "1s"})
        else:
            act = Draw(chance).change()
            while act.name == "clock" or act.fields.get("edit") == "garbage":
                act = Draw(chance).change()
        if act.name == "policy":
            edit = chance.choice(EDITS)
            act = Act("policy", {**act.fields, "edit": edit}, f"policy: {edit}")
        return Act(act.name, {"track": track, "steps": chance.randrange(LONGEST), **act.fields}, act.counted)

    def world(self) -> LinearWorld:
        """Make the world, which starts a stack with and one without the cache when it first needs it."""
        return LinearWorld(trusts_cache=self._trusts_cache)


CAMPAIGN: Campaign = Linearizability()
