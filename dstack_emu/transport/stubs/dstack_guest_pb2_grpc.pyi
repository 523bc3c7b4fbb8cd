from typing import overload

import grpc
import grpc.aio
from google.protobuf.empty_pb2 import Empty

from dstack_emu.attest.proto import dstack_guest_pb2 as pb
from dstack_emu.transport.stubs.calls import AsyncUnaryUnary, UnaryUnary

class DstackGuestStub:
    """Client of dstack_guest.DstackGuest; on a channel of grpc.aio it is a DstackGuestAsyncStub."""

    @overload
    def __new__(cls, channel: grpc.Channel) -> DstackGuestStub: ...
    @overload
    def __new__(cls, channel: grpc.aio.Channel) -> DstackGuestAsyncStub: ...  # type: ignore[misc]
    GetTlsKey: UnaryUnary[pb.GetTlsKeyArgs, pb.GetTlsKeyResponse]
    GetKey: UnaryUnary[pb.GetKeyArgs, pb.GetKeyResponse]
    GetQuote: UnaryUnary[pb.RawQuoteArgs, pb.GetQuoteResponse]
    Attest: UnaryUnary[pb.RawQuoteArgs, pb.AttestResponse]
    EmitEvent: UnaryUnary[pb.EmitEventArgs, Empty]
    Info: UnaryUnary[Empty, pb.AppInfo]
    GpuInfo: UnaryUnary[Empty, pb.GpuInfoResponse]
    Sign: UnaryUnary[pb.SignRequest, pb.SignResponse]
    Verify: UnaryUnary[pb.VerifyRequest, pb.VerifyResponse]
    Version: UnaryUnary[Empty, pb.WorkerVersion]

class DstackGuestAsyncStub:
    """A type alone: there is no such class when the program runs."""

    GetTlsKey: AsyncUnaryUnary[pb.GetTlsKeyArgs, pb.GetTlsKeyResponse]
    GetKey: AsyncUnaryUnary[pb.GetKeyArgs, pb.GetKeyResponse]
    GetQuote: AsyncUnaryUnary[pb.RawQuoteArgs, pb.GetQuoteResponse]
    Attest: AsyncUnaryUnary[pb.RawQuoteArgs, pb.AttestResponse]
    EmitEvent: AsyncUnaryUnary[pb.EmitEventArgs, Empty]
    Info: AsyncUnaryUnary[Empty, pb.AppInfo]
    GpuInfo: AsyncUnaryUnary[Empty, pb.GpuInfoResponse]
    Sign: AsyncUnaryUnary[pb.SignRequest, pb.SignResponse]
    Verify: AsyncUnaryUnary[pb.VerifyRequest, pb.VerifyResponse]
    Version: AsyncUnaryUnary[Empty, pb.WorkerVersion]

class TappdStub:
    """Client of dstack_guest.Tappd; on a channel of grpc.aio it is a TappdAsyncStub."""

    @overload
    def __new__(cls, channel: grpc.Channel) -> TappdStub: ...
    @overload
    def __new__(cls, channel: grpc.aio.Channel) -> TappdAsyncStub: ...  # type: ignore[misc]
    DeriveKey: UnaryUnary[pb.DeriveKeyArgs, pb.GetTlsKeyResponse]
    DeriveK256Key: UnaryUnary[pb.GetKeyArgs, pb.DeriveK256KeyResponse]
    TdxQuote: UnaryUnary[pb.TdxQuoteArgs, pb.TdxQuoteResponse]
    RawQuote: UnaryUnary[pb.RawQuoteArgs, pb.TdxQuoteResponse]
    Info: UnaryUnary[Empty, pb.AppInfo]
    Version: UnaryUnary[Empty, pb.WorkerVersion]

class TappdAsyncStub:
    """A type alone: there is no such class when the program runs."""

    DeriveKey: AsyncUnaryUnary[pb.DeriveKeyArgs, pb.GetTlsKeyResponse]
    DeriveK256Key: AsyncUnaryUnary[pb.GetKeyArgs, pb.DeriveK256KeyResponse]
    TdxQuote: AsyncUnaryUnary[pb.TdxQuoteArgs, pb.TdxQuoteResponse]
    RawQuote: AsyncUnaryUnary[pb.RawQuoteArgs, pb.TdxQuoteResponse]
    Info: AsyncUnaryUnary[Empty, pb.AppInfo]
    Version: AsyncUnaryUnary[Empty, pb.WorkerVersion]

class WorkerStub:
    """Client of dstack_guest.Worker; on a channel of grpc.aio it is a WorkerAsyncStub."""

    @overload
    def __new__(cls, channel: grpc.Channel) -> WorkerStub: ...
    @overload
    def __new__(cls, channel: grpc.aio.Channel) -> WorkerAsyncStub: ...  # type: ignore[misc]
    Info: UnaryUnary[Empty, pb.AppInfo]
    Version: UnaryUnary[Empty, pb.WorkerVersion]
    GetAttestationForAppKey: UnaryUnary[pb.GetAttestationForAppKeyRequest, pb.GetQuoteResponse]

class WorkerAsyncStub:
    """A type alone: there is no such class when the program runs."""

    Info: AsyncUnaryUnary[Empty, pb.AppInfo]
    Version: AsyncUnaryUnary[Empty, pb.WorkerVersion]
    GetAttestationForAppKey: AsyncUnaryUnary[pb.GetAttestationForAppKeyRequest, pb.GetQuoteResponse]
