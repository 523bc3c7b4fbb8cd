"""Why the contracts on the stack's chain denied a boot, and the transactions that admit it, tried on a fork."""

from collections.abc import Iterable, Mapping
from typing import Any

from dstack_emu.chain.admission import Missing, missing
from dstack_emu.chain.ask import completed
from dstack_emu.chain.contracts import BootInfo, Contract, KmsContract
from dstack_emu.chain.errors import ChainError
from dstack_emu.chain.quantities import checksummed
from dstack_emu.control.chain_acts import Acts, decide
from dstack_emu.control.chain_schemas import BODIES
from dstack_emu.control.schemas import ControlError
from dstack_emu.deployment.stack_chain import StackChain


def explain_on_chain(chain: StackChain, decision: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the contracts refuse now of what a webhook was asked, and the fewest acts that admit it.

    `change` has the acts with their bodies, the `differences` as data and as a `diff`, and what the contracts would
    answer `after` them, as a fork of the chain says; `block` is the last one now. `no_change_because` says why there is
    none.
    """
    is_kms = decision["about"] == "kms"
    try:
        boot = _asked(decision["asked"])
        refused = completed(missing(chain.kms, boot, is_kms=is_kms))
        obstacle = next((each.obstacle for each in refused if each.obstacle), "")
        change = _change(chain, refused, boot, is_kms=is_kms) if refused and not obstacle else None
    except ControlError as error:  # nobody here may send it
        return _described(chain, refused) | {"no_change_because": str(error)}
    except (ChainError, ValueError) as error:
        return {"problem": f"the chain: {error}"}
    return _described(chain, refused) | {"change": change, "no_change_because": obstacle or None}


def _described(chain: StackChain, refused: Iterable[Missing]) -> dict[str, Any]:
    return {
        "problem": None,
        "policy": f"DstackKms {chain.kms_address}",
        "contract": None,
        "chain": True,
        "refusals": [
            {
                "rule": each.rule,
                "member": each.member,
                "got": [each.got],
                "wanted": list(each.wanted),
                "contract": checksummed(each.contract.address),
                "place": each.place,
                "line": None,
                "line_text": None,
            }
            for each in refused
        ],
        "change": None,
    }


def _change(chain: StackChain, refused: list[Missing], boot: BootInfo, *, is_kms: bool) -> dict[str, Any]:
    """Try the acts on a fork, and return them; raise `ControlError` if nobody here may send one of them."""
    fork, acts = chain.fork(), []
    for each in refused:
        sender = completed(_owner(chain, fork, each))
        body = {**each.fields, **({} if sender == chain.accounts[0] else {"sender": checksummed(sender)})}
        acts.append({"act": each.act, "body": body})
        parsed = BODIES[str(each.act)].model_validate(body)
        completed(Acts(fork, sender, chain).of(str(each.act), parsed))
    after = completed(decide(fork, boot, is_kms=is_kms))
    return {
        "acts": acts,
        "differences": [each.difference for each in refused],
        "diff": "\n".join(line for each in refused for line in each.diff),
        "block": chain.head,
        "after": {"allowed": after.allowed, "reason": after.reason},
    }


async def _owner(chain: StackChain, fork: KmsContract, each: Missing) -> bytes:
    """Return who has to send an act: anyone may register apps, everything else is the owner's."""
    if each.act in ("app-register", "app-deploy"):
        return chain.accounts[0]
    owner = await Contract(fork.ask, each.contract.address).owner()
    if owner not in chain.accounts:
        raise ControlError(f"{checksummed(owner)} owns the contract that decides, and is no account of this chain")
    return owner


def _asked(asked: Mapping[str, Any]) -> BootInfo:
    def octets(name: str, size: int) -> bytes:
        return bytes.fromhex(asked[name].removeprefix("0x").rjust(2 * size, "0"))

    return BootInfo(
        octets("app_id", 20),
        octets("compose_hash", 32),
        octets("instance_id", 20),
        octets("device_id", 32),
        octets("mr_aggregated", 32),
        os_image_hash=octets("os_image_hash", 32),
        tcb_status=asked["tcb_status"],
    )
