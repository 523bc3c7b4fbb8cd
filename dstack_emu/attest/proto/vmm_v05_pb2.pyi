from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class VmConfiguration(_message.Message):
    __slots__ = ("name", "image", "compose_file", "vcpu", "memory", "disk_size", "ports", "encrypted_env", "app_id", "user_config", "hugepages", "pin_numa", "gpus", "kms_urls", "gateway_urls", "stopped", "no_tee", "networking")
    NAME_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    COMPOSE_FILE_FIELD_NUMBER: _ClassVar[int]
    VCPU_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    DISK_SIZE_FIELD_NUMBER: _ClassVar[int]
    PORTS_FIELD_NUMBER: _ClassVar[int]
    ENCRYPTED_ENV_FIELD_NUMBER: _ClassVar[int]
    APP_ID_FIELD_NUMBER: _ClassVar[int]
    USER_CONFIG_FIELD_NUMBER: _ClassVar[int]
    HUGEPAGES_FIELD_NUMBER: _ClassVar[int]
    PIN_NUMA_FIELD_NUMBER: _ClassVar[int]
    GPUS_FIELD_NUMBER: _ClassVar[int]
    KMS_URLS_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_URLS_FIELD_NUMBER: _ClassVar[int]
    STOPPED_FIELD_NUMBER: _ClassVar[int]
    NO_TEE_FIELD_NUMBER: _ClassVar[int]
    NETWORKING_FIELD_NUMBER: _ClassVar[int]
    name: str
    image: str
    compose_file: str
    vcpu: int
    memory: int
    disk_size: int
    ports: _containers.RepeatedCompositeFieldContainer[PortMapping]
    encrypted_env: bytes
    app_id: str
    user_config: str
    hugepages: bool
    pin_numa: bool
    gpus: GpuConfig
    kms_urls: _containers.RepeatedScalarFieldContainer[str]
    gateway_urls: _containers.RepeatedScalarFieldContainer[str]
    stopped: bool
    no_tee: bool
    networking: NetworkingConfig
    def __init__(self, name: _Optional[str] = ..., image: _Optional[str] = ..., compose_file: _Optional[str] = ..., vcpu: _Optional[int] = ..., memory: _Optional[int] = ..., disk_size: _Optional[int] = ..., ports: _Optional[_Iterable[_Union[PortMapping, _Mapping]]] = ..., encrypted_env: _Optional[bytes] = ..., app_id: _Optional[str] = ..., user_config: _Optional[str] = ..., hugepages: _Optional[bool] = ..., pin_numa: _Optional[bool] = ..., gpus: _Optional[_Union[GpuConfig, _Mapping]] = ..., kms_urls: _Optional[_Iterable[str]] = ..., gateway_urls: _Optional[_Iterable[str]] = ..., stopped: _Optional[bool] = ..., no_tee: _Optional[bool] = ..., networking: _Optional[_Union[NetworkingConfig, _Mapping]] = ...) -> None: ...

class NetworkingConfig(_message.Message):
    __slots__ = ("mode",)
    MODE_FIELD_NUMBER: _ClassVar[int]
    mode: str
    def __init__(self, mode: _Optional[str] = ...) -> None: ...

class UpdateVmRequest(_message.Message):
    __slots__ = ("id", "compose_file", "encrypted_env", "user_config", "update_ports", "ports", "update_kms_urls", "kms_urls", "update_gateway_urls", "gateway_urls", "gpus", "vcpu", "memory", "disk_size", "image", "no_tee")
    ID_FIELD_NUMBER: _ClassVar[int]
    COMPOSE_FILE_FIELD_NUMBER: _ClassVar[int]
    ENCRYPTED_ENV_FIELD_NUMBER: _ClassVar[int]
    USER_CONFIG_FIELD_NUMBER: _ClassVar[int]
    UPDATE_PORTS_FIELD_NUMBER: _ClassVar[int]
    PORTS_FIELD_NUMBER: _ClassVar[int]
    UPDATE_KMS_URLS_FIELD_NUMBER: _ClassVar[int]
    KMS_URLS_FIELD_NUMBER: _ClassVar[int]
    UPDATE_GATEWAY_URLS_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_URLS_FIELD_NUMBER: _ClassVar[int]
    GPUS_FIELD_NUMBER: _ClassVar[int]
    VCPU_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    DISK_SIZE_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    NO_TEE_FIELD_NUMBER: _ClassVar[int]
    id: str
    compose_file: str
    encrypted_env: bytes
    user_config: str
    update_ports: bool
    ports: _containers.RepeatedCompositeFieldContainer[PortMapping]
    update_kms_urls: bool
    kms_urls: _containers.RepeatedScalarFieldContainer[str]
    update_gateway_urls: bool
    gateway_urls: _containers.RepeatedScalarFieldContainer[str]
    gpus: GpuConfig
    vcpu: int
    memory: int
    disk_size: int
    image: str
    no_tee: bool
    def __init__(self, id: _Optional[str] = ..., compose_file: _Optional[str] = ..., encrypted_env: _Optional[bytes] = ..., user_config: _Optional[str] = ..., update_ports: _Optional[bool] = ..., ports: _Optional[_Iterable[_Union[PortMapping, _Mapping]]] = ..., update_kms_urls: _Optional[bool] = ..., kms_urls: _Optional[_Iterable[str]] = ..., update_gateway_urls: _Optional[bool] = ..., gateway_urls: _Optional[_Iterable[str]] = ..., gpus: _Optional[_Union[GpuConfig, _Mapping]] = ..., vcpu: _Optional[int] = ..., memory: _Optional[int] = ..., disk_size: _Optional[int] = ..., image: _Optional[str] = ..., no_tee: _Optional[bool] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ("ids", "brief", "keyword", "page", "page_size")
    IDS_FIELD_NUMBER: _ClassVar[int]
    BRIEF_FIELD_NUMBER: _ClassVar[int]
    KEYWORD_FIELD_NUMBER: _ClassVar[int]
    PAGE_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[str]
    brief: bool
    keyword: str
    page: int
    page_size: int
    def __init__(self, ids: _Optional[_Iterable[str]] = ..., brief: _Optional[bool] = ..., keyword: _Optional[str] = ..., page: _Optional[int] = ..., page_size: _Optional[int] = ...) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("vms", "port_mapping_enabled", "total")
    VMS_FIELD_NUMBER: _ClassVar[int]
    PORT_MAPPING_ENABLED_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    vms: _containers.RepeatedCompositeFieldContainer[VmInfo]
    port_mapping_enabled: bool
    total: int
    def __init__(self, vms: _Optional[_Iterable[_Union[VmInfo, _Mapping]]] = ..., port_mapping_enabled: _Optional[bool] = ..., total: _Optional[int] = ...) -> None: ...

class VmInfo(_message.Message):
    __slots__ = ("id", "name", "status", "uptime", "app_url", "app_id", "instance_id", "configuration", "exited_at", "boot_progress", "boot_error", "shutdown_progress", "image_version", "events")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_FIELD_NUMBER: _ClassVar[int]
    APP_URL_FIELD_NUMBER: _ClassVar[int]
    APP_ID_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    CONFIGURATION_FIELD_NUMBER: _ClassVar[int]
    EXITED_AT_FIELD_NUMBER: _ClassVar[int]
    BOOT_PROGRESS_FIELD_NUMBER: _ClassVar[int]
    BOOT_ERROR_FIELD_NUMBER: _ClassVar[int]
    SHUTDOWN_PROGRESS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_VERSION_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    id: str
    name: str
    status: str
    uptime: str
    app_url: str
    app_id: str
    instance_id: str
    configuration: VmConfiguration
    exited_at: str
    boot_progress: str
    boot_error: str
    shutdown_progress: str
    image_version: str
    events: _containers.RepeatedCompositeFieldContainer[GuestEvent]
    def __init__(self, id: _Optional[str] = ..., name: _Optional[str] = ..., status: _Optional[str] = ..., uptime: _Optional[str] = ..., app_url: _Optional[str] = ..., app_id: _Optional[str] = ..., instance_id: _Optional[str] = ..., configuration: _Optional[_Union[VmConfiguration, _Mapping]] = ..., exited_at: _Optional[str] = ..., boot_progress: _Optional[str] = ..., boot_error: _Optional[str] = ..., shutdown_progress: _Optional[str] = ..., image_version: _Optional[str] = ..., events: _Optional[_Iterable[_Union[GuestEvent, _Mapping]]] = ...) -> None: ...

class GetInfoResponse(_message.Message):
    __slots__ = ("found", "info")
    FOUND_FIELD_NUMBER: _ClassVar[int]
    INFO_FIELD_NUMBER: _ClassVar[int]
    found: bool
    info: VmInfo
    def __init__(self, found: _Optional[bool] = ..., info: _Optional[_Union[VmInfo, _Mapping]] = ...) -> None: ...

class GetMetaResponse(_message.Message):
    __slots__ = ("kms", "gateway", "resources")
    KMS_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    RESOURCES_FIELD_NUMBER: _ClassVar[int]
    kms: KmsSettings
    gateway: GatewaySettings
    resources: ResourcesSettings
    def __init__(self, kms: _Optional[_Union[KmsSettings, _Mapping]] = ..., gateway: _Optional[_Union[GatewaySettings, _Mapping]] = ..., resources: _Optional[_Union[ResourcesSettings, _Mapping]] = ...) -> None: ...

class DhcpLeaseRequest(_message.Message):
    __slots__ = ("mac", "ip")
    MAC_FIELD_NUMBER: _ClassVar[int]
    IP_FIELD_NUMBER: _ClassVar[int]
    mac: str
    ip: str
    def __init__(self, mac: _Optional[str] = ..., ip: _Optional[str] = ...) -> None: ...

class PortMapping(_message.Message):
    __slots__ = ("protocol", "host_port", "vm_port", "host_address")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    HOST_PORT_FIELD_NUMBER: _ClassVar[int]
    VM_PORT_FIELD_NUMBER: _ClassVar[int]
    HOST_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    protocol: str
    host_port: int
    vm_port: int
    host_address: str
    def __init__(self, protocol: _Optional[str] = ..., host_port: _Optional[int] = ..., vm_port: _Optional[int] = ..., host_address: _Optional[str] = ...) -> None: ...

class GpuConfig(_message.Message):
    __slots__ = ("gpus", "attach_mode")
    GPUS_FIELD_NUMBER: _ClassVar[int]
    ATTACH_MODE_FIELD_NUMBER: _ClassVar[int]
    gpus: _containers.RepeatedCompositeFieldContainer[GpuSpec]
    attach_mode: str
    def __init__(self, gpus: _Optional[_Iterable[_Union[GpuSpec, _Mapping]]] = ..., attach_mode: _Optional[str] = ...) -> None: ...

class GpuSpec(_message.Message):
    __slots__ = ("slot",)
    SLOT_FIELD_NUMBER: _ClassVar[int]
    slot: str
    def __init__(self, slot: _Optional[str] = ...) -> None: ...

class GuestEvent(_message.Message):
    __slots__ = ("event", "body", "timestamp")
    EVENT_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMP_FIELD_NUMBER: _ClassVar[int]
    event: str
    body: str
    timestamp: int
    def __init__(self, event: _Optional[str] = ..., body: _Optional[str] = ..., timestamp: _Optional[int] = ...) -> None: ...

class KmsSettings(_message.Message):
    __slots__ = ("url", "urls")
    URL_FIELD_NUMBER: _ClassVar[int]
    URLS_FIELD_NUMBER: _ClassVar[int]
    url: str
    urls: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, url: _Optional[str] = ..., urls: _Optional[_Iterable[str]] = ...) -> None: ...

class GatewaySettings(_message.Message):
    __slots__ = ("url", "base_domain", "port", "agent_port", "urls")
    URL_FIELD_NUMBER: _ClassVar[int]
    BASE_DOMAIN_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    AGENT_PORT_FIELD_NUMBER: _ClassVar[int]
    URLS_FIELD_NUMBER: _ClassVar[int]
    url: str
    base_domain: str
    port: int
    agent_port: int
    urls: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, url: _Optional[str] = ..., base_domain: _Optional[str] = ..., port: _Optional[int] = ..., agent_port: _Optional[int] = ..., urls: _Optional[_Iterable[str]] = ...) -> None: ...

class ResourcesSettings(_message.Message):
    __slots__ = ("max_cvm_number", "max_allocable_vcpu", "max_allocable_memory_in_mb")
    MAX_CVM_NUMBER_FIELD_NUMBER: _ClassVar[int]
    MAX_ALLOCABLE_VCPU_FIELD_NUMBER: _ClassVar[int]
    MAX_ALLOCABLE_MEMORY_IN_MB_FIELD_NUMBER: _ClassVar[int]
    max_cvm_number: int
    max_allocable_vcpu: int
    max_allocable_memory_in_mb: int
    def __init__(self, max_cvm_number: _Optional[int] = ..., max_allocable_vcpu: _Optional[int] = ..., max_allocable_memory_in_mb: _Optional[int] = ...) -> None: ...
