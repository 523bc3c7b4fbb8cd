"""The calls of the control API that explain a call of the journal: the record, its picture, and why it was denied."""

from typing import Any

from dstack_emu.control.kms import KmsControl
from dstack_emu.control.schemas import ControlError
from dstack_emu.observability.journal import Journal
from dstack_emu.observability.mermaid import mermaid
from dstack_emu.observability.record import Record, flattened
from dstack_emu.observability.sequence_diagram import sequence_diagram
from dstack_emu.observability.svg import svg

_WEBHOOK = "auth-"
"""The beginning of a webhook's name; the KMS follows."""


class ExplanationControl(KmsControl):
    """The calls about single records. They raise `ControlError` if they are refused."""

    @property
    def journal(self) -> Journal:
        """The journal, which records every call."""
        return self._instrumentation.journal

    def record(self, record_id: str) -> Record:
        """Return a record of the journal: a call from outside by its number, or one inside it by its id."""
        number = record_id.partition(".")[0]
        if number.isdecimal() and len(number) <= 12:
            for record in self.journal.records(since=int(number) - 1, before=int(number) + 1):
                for each in flattened(record):
                    if each["id"] == record_id:
                        return each
        raise ControlError(
            f"there is no record {record_id!r:.60} in memory: the journal keeps the last "
            f"{self._deployment.config.journal_size} calls, and `up --journal FILE` writes all of them",
            404,
        )

    def diagram(self, record_id: str) -> dict[str, Any]:
        """Return the picture of a record: its size, and shapes, which are elements of SVG."""
        return sequence_diagram(self._call(record_id)).to_json()

    def svg(self, record_id: str) -> str:
        """Return the same picture as an SVG document, which loads nothing."""
        return svg(sequence_diagram(self._call(record_id)))

    def mermaid(self, record_id: str) -> str:
        """Return the same in Mermaid, which many places show that take Markdown."""
        return "\n".join(mermaid(self._call(record_id))) + "\n"

    def _call(self, record_id: str) -> Record:
        record = self.record(record_id)
        if "call" not in record:
            raise ControlError(f"record {record_id} is a verification: the call that it is part of expected")
        return record

    def why(self, record_id: str) -> dict[str, Any]:
        """Explain each denial by a webhook inside a record by the present policy, with the change that admits it."""
        denials = [each for each in flattened(self.record(record_id)) if each.get("outcome") == "denied"]
        return {"denials": [self._explained(each) for each in denials if "decision" in each]}

    def _explained(self, record: Record) -> dict[str, Any]:
        decision, service = record["decision"], record["service"]
        # A webhook of the user's own has the same name for every KMS: whose it is, the caller says.
        kms = (service if service.startswith(_WEBHOOK) else record["caller"]).partition("-")[2]
        said = {key: record[key] for key in ("id", "service", "caller", "call")} | {"kms": kms, "decision": decision}
        if "about" not in decision:  # no webhook has read the request
            fault = record["fault"]["id"] if "fault" in record else "none"
            return said | {"problem": f"The fault {fault} decided this, and no policy: lift the fault."}
        if (chain := self._chain_of(kms)) is not None:
            from dstack_emu.control.chain_denial import explain_on_chain  # few stacks have a chain

            return said | explain_on_chain(chain, decision)
        try:
            path = self._policy_path(kms)
        except ControlError as error:
            return said | {"problem": str(error)}
        release = self._deployment.kms[kms].spec.release if kms in self._deployment.kms else None
        # Imported here, because a stack whose denials nobody looks at starts sooner without it.
        from dstack_emu.control.denial import explain_denial

        return said | explain_denial(path, self._deployment.context.contract_of(release), decision)
