"""One KMS asked over pRPC and over gRPC, whose answers and refusals must be the same."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests import foreign
from tests.foreign import Answer, Identity
from tests.reflected import Outcome, reflected
from tests.running import RunningStack

DENIED, UNAUTHENTICATED, UNAVAILABLE = "PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE"
INVALID, WRONG_PHASE = "INVALID_ARGUMENT", "FAILED_PRECONDITION"


@dataclass(frozen=True)
class Both:
    """One KMS, asked over both transports."""

    prpc_url: str
    grpc_target: str
    root_ca: str | None

    @classmethod
    def of(cls, stack: RunningStack, side: str = "src", *, certificate: bool = False) -> Self:
        """The runtime listeners of one side."""
        target = stack.description["grpc"][f"kms-{side}-grpc" + ("-mtls" if certificate else "")]
        url = stack.services[f"kms-{side}"].replace("http://", "https://")
        return cls(url, target, Path(stack.description["kms_ca"]).read_text())

    def call(self, method: str, identity: Identity | None = None, **arguments: Any) -> tuple[Answer, Outcome]:
        """Ask the same by pRPC and by gRPC, `Service.Method` of package kms."""
        service, _, name = method.partition(".")
        with foreign.kms(self.prpc_url, identity=identity, root_ca=self.root_ca) as connection:
            connection._service = service
            answer = connection.call(name, **arguments)
        with reflected(self.grpc_target, self.root_ca, identity) as client:
            return answer, client.call(f"kms.{service}/{name}", **arguments)

    def refused(self, method: str, identity: Identity | None = None, **arguments: Any) -> tuple[str, str]:
        """Status and text of a refusal, whose text both have."""
        answer, outcome = self.call(method, identity, **arguments)
        assert outcome.text == answer.error
        return outcome.code, outcome.text

    def value(self, method: str, identity: Identity | None = None, **arguments: Any) -> dict[str, Any]:
        """The answer that both give."""
        answer, outcome = self.call(method, identity, **arguments)
        both = outcome.value.keys() & answer.value.keys()
        assert {name: outcome.value[name] for name in both} == {name: answer.value[name] for name in both}
        assert not [name for name in outcome.value.keys() - both if outcome.value[name]]  # JSON omits what is empty
        return outcome.value
