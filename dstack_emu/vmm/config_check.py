"""What `check-config` refuses in a vmm.toml, although a VMM starts with it. Pure.

Source: dstack `vmm/src/config.rs` (validate) and `vmm/src/main.rs` at 312dc605.
"""

from collections.abc import Iterator
from typing import Final
from urllib.parse import urlsplit

from dstack_emu.vmm.config import CvmSection, NetworkingSection, SupervisorSection, VmmConfig

_SHARE_MODES: Final = ("9p", "vhd", "vvfat")


def faults(config: VmmConfig) -> list[str]:
    """Return what is wrong, each with its key, in the order of upstream's checks; upstream ends with the first."""
    return [*_of_machines(config.cvm), *_of_supervisor(config.supervisor), *_of_urls(config.cvm), *_of_address(config)]


def _of_machines(cvm: CvmSection) -> Iterator[str]:
    if cvm.cid_start + cvm.cid_pool_size > 0xFFFF_FFFF:
        yield f"cvm.cid_pool_size: CIDs above {0xFFFF_FFFF}, got {cvm.cid_start} and {cvm.cid_pool_size} more"
    if cvm.host_share_mode not in _SHARE_MODES:
        yield f"cvm.host_share_mode: {', '.join(_SHARE_MODES)} expected, got {cvm.host_share_mode!r:.80}"
    yield from _of_networking(cvm.networking)


def _of_networking(networking: NetworkingSection) -> Iterator[str]:
    if networking.mode == "bridge" and not networking.bridge.strip():
        yield "cvm.networking.bridge: the mode bridge needs one, got nothing"
    if networking.mode == "custom" and not networking.netdev.strip():
        yield "cvm.networking.netdev: the mode custom needs one, got nothing"


def _of_supervisor(supervisor: SupervisorSection) -> Iterator[str]:
    needed = ("sock", "exe", "pid_file", "log_file") if supervisor.auto_start else ("sock",)
    for name in needed:
        if not str(getattr(supervisor, name)).strip():
            yield f"supervisor.{name}: a path expected, got nothing"


def _of_urls(cvm: CvmSection) -> Iterator[str]:
    named = [("cvm.kms_urls", url) for url in cvm.kms_urls]
    named += [("cvm.gateway_urls", url) for url in cvm.gateway_urls]
    optional = {
        "cvm.pccs_url": cvm.pccs_url,
        "cvm.nvidia_attestation_proxy_url": cvm.nvidia_attestation_proxy_url or "",
    }
    named += [(name, url) for name, url in optional.items() if url]
    for name, url in named:
        if not _is_http_url(url):
            yield f"{name}: an http or https URL with a host expected, got {url!r:.200}"


def _is_http_url(text: str) -> bool:
    try:
        url = urlsplit(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and (url.port is None or url.port >= 0)
    except ValueError:
        return False


def _of_address(config: VmmConfig) -> Iterator[str]:
    """Check that there is a port: upstream wants one here even beside a socket file, and starts without."""
    if config.port is None:
        yield "port: check-config wants one beside address, although a VMM starts without it"
