from typing import overload

import grpc
import grpc.aio
from google.protobuf.empty_pb2 import Empty

from dstack_emu.attest.proto import vmm_pb2 as pb
from dstack_emu.transport.stubs.calls import AsyncUnaryUnary, UnaryUnary

class VmmStub:
    """Client of vmm.Vmm; on a channel of grpc.aio it is a VmmAsyncStub."""

    @overload
    def __new__(cls, channel: grpc.Channel) -> VmmStub: ...
    @overload
    def __new__(cls, channel: grpc.aio.Channel) -> VmmAsyncStub: ...  # type: ignore[misc]
    CreateVm: UnaryUnary[pb.VmConfiguration, pb.Id]
    StartVm: UnaryUnary[pb.Id, Empty]
    StopVm: UnaryUnary[pb.Id, Empty]
    RemoveVm: UnaryUnary[pb.Id, Empty]
    UpgradeApp: UnaryUnary[pb.UpdateVmRequest, pb.Id]
    UpdateVm: UnaryUnary[pb.UpdateVmRequest, pb.Id]
    ShutdownVm: UnaryUnary[pb.Id, Empty]
    ResizeVm: UnaryUnary[pb.ResizeVmRequest, Empty]
    GetComposeHash: UnaryUnary[pb.VmConfiguration, pb.ComposeHash]
    Status: UnaryUnary[pb.StatusRequest, pb.StatusResponse]
    ListImages: UnaryUnary[Empty, pb.ImageListResponse]
    GetAppEnvEncryptPubKey: UnaryUnary[pb.AppId, pb.PublicKeyResponse]
    GetInfo: UnaryUnary[pb.Id, pb.GetInfoResponse]
    Version: UnaryUnary[Empty, pb.VersionResponse]
    GetMeta: UnaryUnary[Empty, pb.GetMetaResponse]
    ListGpus: UnaryUnary[Empty, pb.ListGpusResponse]
    ReloadVms: UnaryUnary[Empty, pb.ReloadVmsResponse]
    SvList: UnaryUnary[Empty, pb.SvListResponse]
    SvStop: UnaryUnary[pb.Id, Empty]
    SvRemove: UnaryUnary[pb.Id, Empty]
    ListRegistryImages: UnaryUnary[Empty, pb.RegistryImageListResponse]
    PullRegistryImage: UnaryUnary[pb.PullRegistryImageRequest, Empty]
    DeleteImage: UnaryUnary[pb.Id, Empty]

class VmmAsyncStub:
    """A type alone: there is no such class when the program runs."""

    CreateVm: AsyncUnaryUnary[pb.VmConfiguration, pb.Id]
    StartVm: AsyncUnaryUnary[pb.Id, Empty]
    StopVm: AsyncUnaryUnary[pb.Id, Empty]
    RemoveVm: AsyncUnaryUnary[pb.Id, Empty]
    UpgradeApp: AsyncUnaryUnary[pb.UpdateVmRequest, pb.Id]
    UpdateVm: AsyncUnaryUnary[pb.UpdateVmRequest, pb.Id]
    ShutdownVm: AsyncUnaryUnary[pb.Id, Empty]
    ResizeVm: AsyncUnaryUnary[pb.ResizeVmRequest, Empty]
    GetComposeHash: AsyncUnaryUnary[pb.VmConfiguration, pb.ComposeHash]
    Status: AsyncUnaryUnary[pb.StatusRequest, pb.StatusResponse]
    ListImages: AsyncUnaryUnary[Empty, pb.ImageListResponse]
    GetAppEnvEncryptPubKey: AsyncUnaryUnary[pb.AppId, pb.PublicKeyResponse]
    GetInfo: AsyncUnaryUnary[pb.Id, pb.GetInfoResponse]
    Version: AsyncUnaryUnary[Empty, pb.VersionResponse]
    GetMeta: AsyncUnaryUnary[Empty, pb.GetMetaResponse]
    ListGpus: AsyncUnaryUnary[Empty, pb.ListGpusResponse]
    ReloadVms: AsyncUnaryUnary[Empty, pb.ReloadVmsResponse]
    SvList: AsyncUnaryUnary[Empty, pb.SvListResponse]
    SvStop: AsyncUnaryUnary[pb.Id, Empty]
    SvRemove: AsyncUnaryUnary[pb.Id, Empty]
    ListRegistryImages: AsyncUnaryUnary[Empty, pb.RegistryImageListResponse]
    PullRegistryImage: AsyncUnaryUnary[pb.PullRegistryImageRequest, Empty]
    DeleteImage: AsyncUnaryUnary[pb.Id, Empty]
