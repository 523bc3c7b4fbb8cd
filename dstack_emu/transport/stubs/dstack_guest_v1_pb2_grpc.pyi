from typing import overload

import grpc
import grpc.aio
from google.protobuf.empty_pb2 import Empty

from dstack_emu.attest.proto import dstack_guest_v1_pb2 as pb
from dstack_emu.transport.stubs.calls import AsyncUnaryUnary, UnaryUnary

class DstackGuestStub:
    """Client of dstack.guest.v1.DstackGuest; on a channel of grpc.aio it is a DstackGuestAsyncStub."""

    @overload
    def __new__(cls, channel: grpc.Channel) -> DstackGuestStub: ...
    @overload
    def __new__(cls, channel: grpc.aio.Channel) -> DstackGuestAsyncStub: ...  # type: ignore[misc]
    IssueCert: UnaryUnary[pb.IssueCertRequest, pb.IssueCertResponse]
    GetKey: UnaryUnary[pb.GetKeyRequest, pb.GetKeyResponse]
    Attest: UnaryUnary[pb.AttestRequest, pb.AttestResponse]
    AttestGpu: UnaryUnary[pb.AttestGpuRequest, pb.AttestGpuResponse]
    Info: UnaryUnary[pb.InfoRequest, pb.InfoResponse]
    Version: UnaryUnary[pb.VersionRequest, pb.VersionResponse]

class DstackGuestAsyncStub:
    """A type alone: there is no such class when the program runs."""

    IssueCert: AsyncUnaryUnary[pb.IssueCertRequest, pb.IssueCertResponse]
    GetKey: AsyncUnaryUnary[pb.GetKeyRequest, pb.GetKeyResponse]
    Attest: AsyncUnaryUnary[pb.AttestRequest, pb.AttestResponse]
    AttestGpu: AsyncUnaryUnary[pb.AttestGpuRequest, pb.AttestGpuResponse]
    Info: AsyncUnaryUnary[pb.InfoRequest, pb.InfoResponse]
    Version: AsyncUnaryUnary[pb.VersionRequest, pb.VersionResponse]

class WorkerStub:
    """Client of dstack.guest.v1.Worker; on a channel of grpc.aio it is a WorkerAsyncStub."""

    @overload
    def __new__(cls, channel: grpc.Channel) -> WorkerStub: ...
    @overload
    def __new__(cls, channel: grpc.aio.Channel) -> WorkerAsyncStub: ...  # type: ignore[misc]
    Info: UnaryUnary[pb.InfoRequest, pb.InfoResponse]
    Version: UnaryUnary[pb.VersionRequest, pb.VersionResponse]
    Health: UnaryUnary[pb.HealthRequest, pb.HealthResponse]

class WorkerAsyncStub:
    """A type alone: there is no such class when the program runs."""

    Info: AsyncUnaryUnary[pb.InfoRequest, pb.InfoResponse]
    Version: AsyncUnaryUnary[pb.VersionRequest, pb.VersionResponse]
    Health: AsyncUnaryUnary[pb.HealthRequest, pb.HealthResponse]
