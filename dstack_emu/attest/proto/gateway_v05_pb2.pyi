from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StatusResponse(_message.Message):
    __slots__ = ("id", "url", "bootnode_url", "num_connections", "hosts", "nodes", "uuid")
    ID_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    BOOTNODE_URL_FIELD_NUMBER: _ClassVar[int]
    NUM_CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    HOSTS_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    UUID_FIELD_NUMBER: _ClassVar[int]
    id: int
    url: str
    bootnode_url: str
    num_connections: int
    hosts: _containers.RepeatedCompositeFieldContainer[HostInfo]
    nodes: _containers.RepeatedCompositeFieldContainer[GatewayNodeInfo]
    uuid: bytes
    def __init__(self, id: _Optional[int] = ..., url: _Optional[str] = ..., bootnode_url: _Optional[str] = ..., num_connections: _Optional[int] = ..., hosts: _Optional[_Iterable[_Union[HostInfo, _Mapping]]] = ..., nodes: _Optional[_Iterable[_Union[GatewayNodeInfo, _Mapping]]] = ..., uuid: _Optional[bytes] = ...) -> None: ...

class GatewayNodeInfo(_message.Message):
    __slots__ = ("id", "uuid", "url", "last_seen", "wg_public_key", "wg_ip", "wg_endpoint")
    ID_FIELD_NUMBER: _ClassVar[int]
    UUID_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_FIELD_NUMBER: _ClassVar[int]
    WG_PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    WG_IP_FIELD_NUMBER: _ClassVar[int]
    WG_ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    id: int
    uuid: bytes
    url: str
    last_seen: int
    wg_public_key: str
    wg_ip: str
    wg_endpoint: str
    def __init__(self, id: _Optional[int] = ..., uuid: _Optional[bytes] = ..., url: _Optional[str] = ..., last_seen: _Optional[int] = ..., wg_public_key: _Optional[str] = ..., wg_ip: _Optional[str] = ..., wg_endpoint: _Optional[str] = ...) -> None: ...

class HostInfo(_message.Message):
    __slots__ = ("instance_id", "ip", "app_id", "base_domain", "latest_handshake", "num_connections")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    IP_FIELD_NUMBER: _ClassVar[int]
    APP_ID_FIELD_NUMBER: _ClassVar[int]
    BASE_DOMAIN_FIELD_NUMBER: _ClassVar[int]
    LATEST_HANDSHAKE_FIELD_NUMBER: _ClassVar[int]
    NUM_CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    ip: str
    app_id: str
    base_domain: str
    latest_handshake: int
    num_connections: int
    def __init__(self, instance_id: _Optional[str] = ..., ip: _Optional[str] = ..., app_id: _Optional[str] = ..., base_domain: _Optional[str] = ..., latest_handshake: _Optional[int] = ..., num_connections: _Optional[int] = ...) -> None: ...

class GetInfoResponse(_message.Message):
    __slots__ = ("found", "info")
    FOUND_FIELD_NUMBER: _ClassVar[int]
    INFO_FIELD_NUMBER: _ClassVar[int]
    found: bool
    info: HostInfo
    def __init__(self, found: _Optional[bool] = ..., info: _Optional[_Union[HostInfo, _Mapping]] = ...) -> None: ...

class LastSeenEntry(_message.Message):
    __slots__ = ("node_id", "timestamp")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMP_FIELD_NUMBER: _ClassVar[int]
    node_id: int
    timestamp: int
    def __init__(self, node_id: _Optional[int] = ..., timestamp: _Optional[int] = ...) -> None: ...

class PeerSyncStatus(_message.Message):
    __slots__ = ("id", "local_ack", "peer_ack", "buffered_logs", "last_seen")
    ID_FIELD_NUMBER: _ClassVar[int]
    LOCAL_ACK_FIELD_NUMBER: _ClassVar[int]
    PEER_ACK_FIELD_NUMBER: _ClassVar[int]
    BUFFERED_LOGS_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_FIELD_NUMBER: _ClassVar[int]
    id: int
    local_ack: int
    peer_ack: int
    buffered_logs: int
    last_seen: _containers.RepeatedCompositeFieldContainer[LastSeenEntry]
    def __init__(self, id: _Optional[int] = ..., local_ack: _Optional[int] = ..., peer_ack: _Optional[int] = ..., buffered_logs: _Optional[int] = ..., last_seen: _Optional[_Iterable[_Union[LastSeenEntry, _Mapping]]] = ...) -> None: ...

class StoreSyncStatus(_message.Message):
    __slots__ = ("name", "node_id", "n_keys", "next_seq", "dirty", "wal_enabled", "peers")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    N_KEYS_FIELD_NUMBER: _ClassVar[int]
    NEXT_SEQ_FIELD_NUMBER: _ClassVar[int]
    DIRTY_FIELD_NUMBER: _ClassVar[int]
    WAL_ENABLED_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    name: str
    node_id: int
    n_keys: int
    next_seq: int
    dirty: bool
    wal_enabled: bool
    peers: _containers.RepeatedCompositeFieldContainer[PeerSyncStatus]
    def __init__(self, name: _Optional[str] = ..., node_id: _Optional[int] = ..., n_keys: _Optional[int] = ..., next_seq: _Optional[int] = ..., dirty: _Optional[bool] = ..., wal_enabled: _Optional[bool] = ..., peers: _Optional[_Iterable[_Union[PeerSyncStatus, _Mapping]]] = ...) -> None: ...

class WaveKvStatusResponse(_message.Message):
    __slots__ = ("enabled", "persistent", "ephemeral")
    ENABLED_FIELD_NUMBER: _ClassVar[int]
    PERSISTENT_FIELD_NUMBER: _ClassVar[int]
    EPHEMERAL_FIELD_NUMBER: _ClassVar[int]
    enabled: bool
    persistent: StoreSyncStatus
    ephemeral: StoreSyncStatus
    def __init__(self, enabled: _Optional[bool] = ..., persistent: _Optional[_Union[StoreSyncStatus, _Mapping]] = ..., ephemeral: _Optional[_Union[StoreSyncStatus, _Mapping]] = ...) -> None: ...
