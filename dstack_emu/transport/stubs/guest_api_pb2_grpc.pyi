from typing import overload

import grpc
import grpc.aio
from google.protobuf.empty_pb2 import Empty

from dstack_emu.attest.proto import guest_api_pb2 as pb
from dstack_emu.transport.stubs.calls import AsyncUnaryUnary, UnaryUnary

class GuestApiStub:
    """Client of guest_api.GuestApi; on a channel of grpc.aio it is a GuestApiAsyncStub."""

    @overload
    def __new__(cls, channel: grpc.Channel) -> GuestApiStub: ...
    @overload
    def __new__(cls, channel: grpc.aio.Channel) -> GuestApiAsyncStub: ...  # type: ignore[misc]
    Info: UnaryUnary[Empty, pb.GuestInfo]
    SysInfo: UnaryUnary[Empty, pb.SystemInfo]
    NetworkInfo: UnaryUnary[Empty, pb.NetworkInformation]
    ListContainers: UnaryUnary[Empty, pb.ListContainersResponse]
    Shutdown: UnaryUnary[Empty, Empty]

class GuestApiAsyncStub:
    """A type alone: there is no such class when the program runs."""

    Info: AsyncUnaryUnary[Empty, pb.GuestInfo]
    SysInfo: AsyncUnaryUnary[Empty, pb.SystemInfo]
    NetworkInfo: AsyncUnaryUnary[Empty, pb.NetworkInformation]
    ListContainers: AsyncUnaryUnary[Empty, pb.ListContainersResponse]
    Shutdown: AsyncUnaryUnary[Empty, Empty]

class ProxiedGuestApiStub:
    """Client of guest_api.ProxiedGuestApi; on a channel of grpc.aio it is a ProxiedGuestApiAsyncStub."""

    @overload
    def __new__(cls, channel: grpc.Channel) -> ProxiedGuestApiStub: ...
    @overload
    def __new__(cls, channel: grpc.aio.Channel) -> ProxiedGuestApiAsyncStub: ...  # type: ignore[misc]
    Info: UnaryUnary[pb.Id, pb.GuestInfo]
    SysInfo: UnaryUnary[pb.Id, pb.SystemInfo]
    NetworkInfo: UnaryUnary[pb.Id, pb.NetworkInformation]
    ListContainers: UnaryUnary[pb.Id, pb.ListContainersResponse]
    Shutdown: UnaryUnary[pb.Id, Empty]

class ProxiedGuestApiAsyncStub:
    """A type alone: there is no such class when the program runs."""

    Info: AsyncUnaryUnary[pb.Id, pb.GuestInfo]
    SysInfo: AsyncUnaryUnary[pb.Id, pb.SystemInfo]
    NetworkInfo: AsyncUnaryUnary[pb.Id, pb.NetworkInformation]
    ListContainers: AsyncUnaryUnary[pb.Id, pb.ListContainersResponse]
    Shutdown: AsyncUnaryUnary[pb.Id, Empty]
