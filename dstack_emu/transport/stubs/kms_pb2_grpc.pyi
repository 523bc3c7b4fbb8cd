from typing import overload

import grpc
import grpc.aio
from google.protobuf.empty_pb2 import Empty

from dstack_emu.attest.proto import kms_pb2 as pb
from dstack_emu.transport.stubs.calls import AsyncUnaryUnary, UnaryUnary

class OnboardStub:
    """Client of kms.Onboard; on a channel of grpc.aio it is a OnboardAsyncStub."""

    @overload
    def __new__(cls, channel: grpc.Channel) -> OnboardStub: ...
    @overload
    def __new__(cls, channel: grpc.aio.Channel) -> OnboardAsyncStub: ...  # type: ignore[misc]
    Bootstrap: UnaryUnary[pb.BootstrapRequest, pb.BootstrapResponse]
    Onboard: UnaryUnary[pb.OnboardRequest, pb.OnboardResponse]
    GetAttestationInfo: UnaryUnary[Empty, pb.AttestationInfoResponse]
    Finish: UnaryUnary[Empty, Empty]

class OnboardAsyncStub:
    """A type alone: there is no such class when the program runs."""

    Bootstrap: AsyncUnaryUnary[pb.BootstrapRequest, pb.BootstrapResponse]
    Onboard: AsyncUnaryUnary[pb.OnboardRequest, pb.OnboardResponse]
    GetAttestationInfo: AsyncUnaryUnary[Empty, pb.AttestationInfoResponse]
    Finish: AsyncUnaryUnary[Empty, Empty]

class KMSStub:
    """Client of kms.KMS; on a channel of grpc.aio it is a KMSAsyncStub."""

    @overload
    def __new__(cls, channel: grpc.Channel) -> KMSStub: ...
    @overload
    def __new__(cls, channel: grpc.aio.Channel) -> KMSAsyncStub: ...  # type: ignore[misc]
    GetAppKey: UnaryUnary[pb.GetAppKeyRequest, pb.AppKeyResponse]
    GetKmsKey: UnaryUnary[pb.GetKmsKeyRequest, pb.KmsKeyResponse]
    GetAppEnvEncryptPubKey: UnaryUnary[pb.AppId, pb.PublicKeyResponse]
    GetMeta: UnaryUnary[Empty, pb.GetMetaResponse]
    GetTempCaCert: UnaryUnary[Empty, pb.GetTempCaCertResponse]
    SignCert: UnaryUnary[pb.SignCertRequest, pb.SignCertResponse]

class KMSAsyncStub:
    """A type alone: there is no such class when the program runs."""

    GetAppKey: AsyncUnaryUnary[pb.GetAppKeyRequest, pb.AppKeyResponse]
    GetKmsKey: AsyncUnaryUnary[pb.GetKmsKeyRequest, pb.KmsKeyResponse]
    GetAppEnvEncryptPubKey: AsyncUnaryUnary[pb.AppId, pb.PublicKeyResponse]
    GetMeta: AsyncUnaryUnary[Empty, pb.GetMetaResponse]
    GetTempCaCert: AsyncUnaryUnary[Empty, pb.GetTempCaCertResponse]
    SignCert: AsyncUnaryUnary[pb.SignCertRequest, pb.SignCertResponse]

class AdminStub:
    """Client of kms.Admin; on a channel of grpc.aio it is a AdminAsyncStub."""

    @overload
    def __new__(cls, channel: grpc.Channel) -> AdminStub: ...
    @overload
    def __new__(cls, channel: grpc.aio.Channel) -> AdminAsyncStub: ...  # type: ignore[misc]
    ClearImageCache: UnaryUnary[pb.ClearImageCacheRequest, Empty]
    GetKmsKey: UnaryUnary[pb.GetKmsKeyRequest, pb.KmsKeyResponse]

class AdminAsyncStub:
    """A type alone: there is no such class when the program runs."""

    ClearImageCache: AsyncUnaryUnary[pb.ClearImageCacheRequest, Empty]
    GetKmsKey: AsyncUnaryUnary[pb.GetKmsKeyRequest, pb.KmsKeyResponse]
