"""The target of a run: the addresses of two KMS, their webhooks and an app's agent, and the policy files.

The format is that of the line that `dstack-emu up --json` prints, and of stack.json in the state folder. Keys that the
runbook does not use are ignored.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from dstack_emu.attest.certificate import load_pem
from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.eth_address import decode_address
from dstack_emu.attest.release import Release, release
from dstack_emu.attest.verify import TrustAnchor
from dstack_emu.transport.urls import is_http_url
from dstack_emu.transport.validation import problems

SIDES: Final = ("src", "dst")
INTEL: Final = "Intel's production root"
_NO_NAMES: Final[Mapping[str, str]] = MappingProxyType({})


class TargetError(Exception):
    """A description of a stack that cannot be used; the text names the file and the key."""


def _http(url: str) -> str:
    if not is_http_url(url):
        raise ValueError(f"http(s)://host:port expected, got {url!r:.100}")
    return url.rstrip("/")


def _known_release(name: str) -> str:
    try:
        return release(name).name
    except FormatError as error:
        raise ValueError(str(error)) from error


Url = Annotated[str, AfterValidator(_http)]


def _address(text: str) -> str:
    try:
        decode_address(text)
    except FormatError as error:
        raise ValueError(str(error)) from error
    return text


EthAddress = Annotated[str, AfterValidator(_address)]
ReleaseName = Annotated[str, AfterValidator(_known_release)]


class _Services(BaseModel):
    auth_src: Url = Field(alias="auth-src")
    auth_dst: Url = Field(alias="auth-dst")
    chain: Url | None = None
    kms_src: Url = Field(alias="kms-src")
    kms_dst: Url = Field(alias="kms-dst")
    pccs: Url | None = None
    app: str | None = None
    verifier: Url | None = None


class _Sides(BaseModel):
    src: Path | None = None
    dst: Path | None = None


class _Contracts(BaseModel):
    kms: EthAddress
    owner: EthAddress


class _Chain(BaseModel):
    contracts: _Contracts
    decides_for: list[str]


class _Runtime(BaseModel):
    model_config = ConfigDict(extra="forbid")

    src: Url | None = None
    dst: Url | None = None


class _Description(BaseModel):
    services: _Services
    policies: _Sides
    root_ca: Path | None = None
    runtime: _Runtime = _Runtime()
    source_url: Url | None = None
    release: ReleaseName | None = None
    grpc: dict[str, str] = {}
    chain: _Chain | None = None


@dataclass(frozen=True, slots=True)
class TargetChain:
    """The chain of a target: its JSON-RPC, and the addresses of DstackKms and of its owner, 20 bytes each."""

    rpc_url: str
    kms: bytes
    owner: bytes


@dataclass(frozen=True, slots=True)
class TargetKms:
    """One KMS: its URLs in the onboard phase and in the runtime phase, its webhook, and the webhook's policy file.

    `policy` is None if contracts decide. `grpc` and `grpc_mtls` are its gRPC listeners (`host:port`), empty if they are
    not needed.
    """

    onboard: str
    runtime: str
    auth: str
    policy: Path | None
    grpc: str = ""
    grpc_mtls: str = ""


@dataclass(frozen=True, slots=True)
class Target:
    """A stack to run the runbook on.

    `source_url` is the URL by which kms-dst reaches kms-src. `release` is the dstack release, if the description names
    it. Without a `pccs` no evidence can be verified, without an `app` (a guest agent, as URL or socket) there is no
    attested client, without a `verifier` there is no second verdict. `chain` has the contracts that decide for the KMS
    without a policy. In the evidence, `names` replace addresses and
    folders, which differ from run to run.
    """

    kms: Mapping[str, TargetKms]
    source_url: str
    anchor: TrustAnchor
    root: str
    pccs: str | None = None
    app: str | None = None
    verifier: str | None = None
    release: Release | None = None
    chain: TargetChain | None = None
    names: Mapping[str, str] = field(default_factory=lambda: _NO_NAMES)

    @property
    def urls(self) -> tuple[str, ...]:
        """All URLs that are called, which may contain passwords."""
        of_kms = (url for kms in self.kms.values() for url in (kms.onboard, kms.runtime, kms.auth))
        return tuple(filter(None, (*of_kms, self.source_url, self.pccs, self.app, self.verifier)))

    @classmethod
    def load(cls, path: Path, source_url: str | None = None, *, by_grpc: bool = False) -> Self:
        """Read a description from a file; paths in it are relative to its folder. Raises `TargetError`.

        `source_url` replaces the file's. With `by_grpc` the description must name gRPC listeners.
        """
        try:
            document = json.loads(path.read_text())
        except OSError as error:
            raise TargetError(f"{path}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise TargetError(f"{path}: JSON expected: {error}") from error
        if source_url is not None and isinstance(document, dict):
            document["source_url"] = source_url
        return cls.of(document, str(path), path.absolute().parent, by_grpc=by_grpc)

    @classmethod
    def of(
        cls, document: Any, name: str, folder: Path, names: Mapping[str, str] = _NO_NAMES, *, by_grpc: bool = False
    ) -> Self:
        """Read a description that is already parsed. Raises `TargetError`."""
        _require_policies(document, name)
        try:
            found = _Description.model_validate(document)
        except ValidationError as error:
            raise TargetError(f"{name}: {problems(error, document='the document')[0]}") from error
        services, runtime = found.services, found.runtime
        kms = {
            side: TargetKms(
                onboard=f"http://{urlsplit(url).netloc}" if given is None else url,
                runtime=given or f"https://{urlsplit(url).netloc}",
                auth=auth,
                policy=_policy_of(found, name, side, policy, folder),
                grpc=_grpc_target(found, name, f"kms-{side}-grpc") if by_grpc else "",
                grpc_mtls=_grpc_target(found, name, f"kms-{side}-grpc-mtls") if by_grpc else "",
            )
            for side, url, given, auth, policy in (
                ("src", services.kms_src, runtime.src, services.auth_src, found.policies.src),
                ("dst", services.kms_dst, runtime.dst, services.auth_dst, found.policies.dst),
            )
        }
        anchor, root = TrustAnchor.intel(), INTEL
        if found.root_ca is not None:
            path = folder / found.root_ca
            try:
                anchor, root = TrustAnchor.of(load_pem(path.read_text(), "root certificate")), "the root in root_ca"
            except (OSError, ValueError, FormatError) as error:
                raise TargetError(f"{name}: root_ca: {path}: {error}") from error
        return cls(
            kms=kms,
            source_url=found.source_url or f"{kms['src'].runtime}/prpc",
            anchor=anchor,
            root=root,
            pccs=services.pccs,
            app=services.app,
            verifier=services.verifier,
            release=None if found.release is None else release(found.release),
            chain=_chain_of(found),
            names=names,
        )


def _policy_of(found: _Description, name: str, side: str, policy: Path | None, folder: Path) -> Path | None:
    if policy is None and (found.services.chain is None or found.chain is None or side not in found.chain.decides_for):
        raise TargetError(f"{name}: policies.{side}: Field required")
    return None if policy is None else folder / policy


def _chain_of(found: _Description) -> TargetChain | None:
    if found.services.chain is None or found.chain is None:
        return None
    contracts = found.chain.contracts
    return TargetChain(found.services.chain, decode_address(contracts.kms), decode_address(contracts.owner))


def _require_policies(document: Any, name: str) -> None:
    """Raise `TargetError` if a KMS asks a webhook of the user's own, and no policy file of that is named."""
    if not isinstance(document, dict) or not isinstance(webhooks := document.get("webhooks"), dict):
        return
    for side, url in webhooks.items():
        service = f"auth-{side}"
        if service not in document.get("services", {}) or side not in document.get("policies", {}):
            raise TargetError(
                f"{name}: kms-{side} asks the webhook {url}, whose policy the runbook cannot write. Run it on a stack "
                "without --webhook, and with --auth eth without --eth-rpc-url: then it has a chain of its own, and the "
                "runbook sends transactions. Or, if that webhook reads a file in auth-simple's format at every "
                f"request, name both as services.{service} and policies.{side} in a copy of the description"
            )


def _grpc_target(found: _Description, name: str, key: str) -> str:
    target = found.grpc.get(key)
    if target is None:
        raise TargetError(
            f"{name}: grpc.{key}: not there, and --transport grpc needs it: start the stack with `up --grpc`"
        )
    host, _, port = target.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise TargetError(f"{name}: grpc.{key}: host:port expected, got {target!r:.100}")
    return target
