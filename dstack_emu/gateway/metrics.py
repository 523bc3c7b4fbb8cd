"""What the admin listener tells Prometheus, under upstream's names.

What nothing here does, such as WireGuard and kTLS, is counted as zero. Source of names and labels: dstack
`gateway/src/metrics.rs` as stored between 312dc605 and 0.6.0, which merged it (pull request 1037).
"""

from collections.abc import Iterable, Mapping
from typing import Final

from dstack_emu.gateway.gateway import Gateway

MAX_CERTIFICATES: Final = 256
"""The maximum number of domains whose certificates have a line."""

_PREFIXES: Final = (
    "inst/",
    "node/",
    "conn/",
    "handshake/",
    "last_seen/node/",
    "__peer_addr/",
    "cert/",
    "dns_cred/",
    "global/",
    "other",
)
Sample = tuple[Mapping[str, object], int]


def metrics_text(gateway: Gateway) -> str:
    """Return every metric in Prometheus's text format."""
    families = (_state(gateway), _acceleration(), _stores(gateway), _failures(), _certificates(gateway))
    return "".join(text for family in families for text in family)


def _state(gateway: Gateway) -> Iterable[str]:
    records, release = gateway.records, gateway.release
    build = {"version": f"v{release.version} (git:{release.revision})", "node_id": gateway.node_id}
    active = 0 if gateway.is_down else 1
    yield _family("build_info", "gauge", "What runs.", [(build, 1)])
    yield _single("cluster_instances", "gauge", "Registered instances.", len(records.instances))
    yield _single("connections", "gauge", "Open connections of clients.", gateway.connections.total)
    yield _single("cluster_nodes", "gauge", "Gateways that are known.", 1)
    yield _single("cluster_nodes_active", "gauge", "Gateways that are not marked as down.", active)


def _acceleration() -> Iterable[str]:
    for name in ("ktls_offloaded", "ktls_offload_failed", "splice_engaged"):
        yield _single(f"{name}_total", "counter", "Not used here.", 0)


def _stores(gateway: Gateway) -> Iterable[str]:
    keys = {"persistent": gateway.persistent_keys(), "ephemeral": gateway.ephemeral_keys()}
    after = {"persistent": gateway.writes + 1, "ephemeral": gateway.publications + 1}
    stores = [{"store": name} for name in keys]
    peers = sorted(gateway.records.peer_urls.keys() - {gateway.node_id})
    links: list[Sample] = [({**store, "peer": peer}, 0) for store in stores for peer in peers]
    yield _family("cluster_kv_keys", "gauge", "Stored entries.", [(each, keys[each["store"]]) for each in stores])
    yield _family(
        "kv_next_seq", "gauge", "Number of the next change.", [(each, after[each["store"]]) for each in stores]
    )
    yield _family("kv_dirty", "gauge", "Whether a change is not stored.", [(each, 0) for each in stores])
    yield _family("kv_peer_local_ack", "gauge", "Changes of a node that were read here.", links)
    yield _family("kv_peer_remote_ack", "gauge", "Changes of this node that another one has read.", links)


def _failures() -> Iterable[str]:
    unread: list[Sample] = [({"prefix": prefix}, 0) for prefix in _PREFIXES]
    yield _family("kv_decode_failures_total", "counter", "Entries that could not be read.", unread)
    yield _single("wg_reconfigure_total", "counter", "Configurations of WireGuard, which is not used here.", 0)
    yield _single("wg_reconfigure_failures_total", "counter", "Such configurations that failed.", 0)
    yield _single("kv_persist_failures_total", "counter", "Snapshots that failed.", 0)


def _certificates(gateway: Gateway) -> Iterable[str]:
    found = sorted(gateway.records.certificates.items())
    ends: list[Sample] = [({"domain": name}, each.not_after) for name, each in found[:MAX_CERTIFICATES]]
    yield _single("cluster_cert_domains", "gauge", "Domains with a certificate.", len(found))
    yield _family("cluster_cert_not_after_seconds", "gauge", "Unix seconds at which a certificate ends.", ends)


def _single(name: str, kind: str, text: str, value: int) -> str:
    return _family(name, kind, text, [({}, value)])


def _family(name: str, kind: str, text: str, samples: Iterable[Sample]) -> str:
    full = f"dstack_gateway_{name}"
    lines = [f"# HELP {full} {text}", f"# TYPE {full} {kind}"]
    lines += [f"{full}{_labels(labels)} {value}" for labels, value in samples]
    return "\n".join(lines) + "\n"


def _labels(labels: Mapping[str, object]) -> str:
    pairs = ",".join(f'{name}="{_escaped(str(value))}"' for name, value in labels.items())
    return f"{{{pairs}}}" if pairs else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
