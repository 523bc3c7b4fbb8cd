from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class ClearImageCacheRequest(_message.Message):
    __slots__ = ("token", "image_hash", "config_hash")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    IMAGE_HASH_FIELD_NUMBER: _ClassVar[int]
    CONFIG_HASH_FIELD_NUMBER: _ClassVar[int]
    token: str
    image_hash: str
    config_hash: str
    def __init__(self, token: _Optional[str] = ..., image_hash: _Optional[str] = ..., config_hash: _Optional[str] = ...) -> None: ...
