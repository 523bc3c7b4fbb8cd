"""The files of kubernetes/: what each kustomization lists, and the pods that they describe."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.repository import ROOT

FOLDER = ROOT / "kubernetes"
ROOTS = ("run", "parallel")
"""The folders that a person applies."""

Manifest = dict[str, Any]


def kustomization(folder: Path) -> Manifest:
    """Return the kustomization of a folder."""
    loaded: Manifest = yaml.safe_load((folder / "kustomization.yaml").read_text())
    return loaded


def manifests(folder: Path) -> Iterator[Manifest]:
    """Yield each object that the kustomization of a folder lists, and those of the folders that it lists."""
    for name in kustomization(folder)["resources"]:
        listed = (folder / name).resolve()
        if listed.is_dir():
            yield from manifests(listed)
        else:
            yield from yaml.safe_load_all(listed.read_text())


def only(folder: Path, kind: str, name: str) -> Manifest:
    """Return the one object of that kind and name."""
    (found,) = (each for each in manifests(folder) if (each["kind"], each["metadata"]["name"]) == (kind, name))
    return found


def pod_of(workload: Manifest) -> Manifest:
    """Return the pod template of a Deployment or Job."""
    template: Manifest = workload["spec"]["template"]
    return template


def containers(pod: Manifest) -> list[Manifest]:
    """Return all containers of a pod, those of its start first."""
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]
