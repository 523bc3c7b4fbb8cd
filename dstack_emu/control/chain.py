"""The calls of the control API about the chain of a stack: what its contracts hold, its transactions, and acts."""

from typing import TYPE_CHECKING, Any

from dstack_emu.control.chain_schemas import BODIES
from dstack_emu.control.explanations import ExplanationControl
from dstack_emu.control.schemas import ControlError, checked, unknown

if TYPE_CHECKING:
    from dstack_emu.deployment.stack_chain import StackChain

SERVICE = "chain"
CALL = "eth_sendTransaction"
CALLER = "control"


class ChainControl(ExplanationControl):
    """The calls about the chain. They raise `ControlError` if they are refused."""

    def chain(self) -> dict[str, Any]:
        """Return what the contracts of the stack's chain hold, and what they decide on each trust domain.

        Decisions are those on a platform whose TCB status is UpToDate. A stack without a chain has nothing.
        """
        if self._deployment.context.chain is None:
            return {}
        from dstack_emu.control.chain_acts import holdings  # few stacks have a chain: the others start sooner

        return holdings(self._own_chain(), self._deployment.guests)

    def chain_transactions(self, *, since: int = -1, limit: int = 1000) -> list[dict[str, Any]]:
        """Return the last transactions after a block, oldest first, with their events."""
        if self._deployment.context.chain is None:
            return []
        from dstack_emu.control.chain_acts import history

        return history(self._own_chain(), since, limit)

    def chain_act(self, act: str, **fields: Any) -> dict[str, Any]:
        """Send an act of `dstack-emu chain`, such as `allow` with `kind` and `value`; return what it has changed.

        The answer has the contract's answer before and after it, its transaction and block, and the decision on each
        trust domain before and after it. With `preview` nothing is sent.
        """
        if act not in BODIES:
            raise unknown("act", act, BODIES)
        chain, body = self._own_chain(), checked(BODIES[act], fields)
        from dstack_emu.control.chain_acts import perform

        if body.preview or not self.journal.enabled:
            return perform(chain, act, body, self._deployment.guests)
        span = self.journal.begin(SERVICE, CALL, None, 0, CALLER)
        span.annotate("chain", {"function": act})
        try:
            done = perform(chain, act, body, self._deployment.guests)
        except ControlError as error:
            self.journal.end(span, error.status, str(error))
            raise
        span.annotate("chain", {"function": act, "block": hex(done["block"]), "result": done["transaction"]})
        self.journal.end(span, 200)
        return done

    def _own_chain(self) -> "StackChain":
        chain = self._deployment.context.chain
        if chain is None:
            raise ControlError(
                "the stack has no chain of its own: start it with --auth eth; for another chain there is "
                "`dstack-emu chain ACT --rpc-url URL --kms-contract ADDRESS`",
                409,
            )
        return chain
