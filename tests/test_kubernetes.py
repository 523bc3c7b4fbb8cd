"""The files of kubernetes/ are complete, agree with one another and with the image, and are what Kubernetes accepts.

The second part needs programs that `make kubernetes` installs, and sets DSTACK_EMU_KUBERNETES.
`tests/test_kubernetes_docker.py` runs the pods as far as a container engine can.
"""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from dstack_emu.attest.version import EMULATOR
from dstack_emu.transport.ports import PORTS
from tests.documents import blocks, code, document, rows, section
from tests.manifests import FOLDER, ROOTS, Manifest, containers, kustomization, manifests, only, pod_of
from tests.repository import ROOT

OPTIONAL = {"vmm", "gateway", "gateway-admin", "ingress", "agent-gateway", "chain"}
"""Parts that a stack has only if it is asked for."""
PODS = [
    pytest.param(pod_of(each), id=f"{root}-{each['metadata']['name']}")
    for root in ROOTS
    for each in manifests(FOLDER / root)
    if each["kind"] in ("Deployment", "Job")
]
LABEL = {"matchLabels": {"app.kubernetes.io/name": "dstack-emu"}}
CLIENT = {"matchLabels": {"dstack-emu-client": "true"}}


def test_kustomizations_list_every_file_and_change_only_namespace_and_image() -> None:
    for folder in FOLDER.iterdir():
        listed = kustomization(folder)
        files = {path.name for path in folder.iterdir()} - {"kustomization.yaml"}
        assert {name for name in listed["resources"] if not name.startswith("..")} == files
        assert listed.keys() - {"namespace", "images"} == {"apiVersion", "kind", "resources"}
        for image in listed.get("images", []):
            assert (image["name"], image["newTag"]) == ("dstack-emu", EMULATOR)


@pytest.mark.parametrize("root", ROOTS)
def test_namespace_is_restricted_and_that_of_the_kustomization(root: str) -> None:
    objects = list(manifests(FOLDER / root))
    (namespace,) = (each for each in objects if each["kind"] == "Namespace")
    assert namespace["metadata"]["name"] == kustomization(FOLDER / root)["namespace"]
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    named = [(each["kind"], each["metadata"]["name"]) for each in objects]
    assert len(named) == len(set(named))
    assert not [each for each in objects if "namespace" in each["metadata"] or each["kind"] == "Secret"]


@pytest.mark.parametrize("pod", PODS)
def test_pod_has_no_right_that_it_does_not_need(pod: Manifest) -> None:
    spec = pod["spec"]
    (user,) = re.findall(r"^USER (\d+):(\d+)$", document("Dockerfile"), re.MULTILINE)
    assert spec["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": int(user[0]),
        "runAsGroup": int(user[1]),
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert (spec["automountServiceAccountToken"], spec["enableServiceLinks"]) == (False, False)
    assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC", "serviceAccountName"}
    for volume in spec["volumes"]:
        kind = volume.keys() - {"name"}
        assert kind == {"configMap"} or volume["emptyDir"].keys() == {"medium", "sizeLimit"}
    for container in containers(pod):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["requests"].keys() == container["resources"]["limits"].keys() == {"cpu", "memory"}
        assert container["image"] == "dstack-emu"


def test_service_and_policy_have_every_port_of_the_stack() -> None:
    pod = pod_of(only(FOLDER / "base", "Deployment", "dstack-emu"))
    ports = {name: port for name, port in PORTS.items() if name not in OPTIONAL}
    (stack,) = pod["spec"]["containers"]
    assert {each["name"]: each["containerPort"] for each in stack["ports"]} == ports
    service = only(FOLDER / "base", "Service", "dstack-emu")["spec"]
    assert {each["name"]: each["port"] for each in service["ports"]} == ports
    assert [each["targetPort"] for each in service["ports"]] == [each["name"] for each in service["ports"]]
    (rule,) = only(FOLDER / "base", "NetworkPolicy", "stack")["spec"]["ingress"]
    assert {each["port"] for each in rule["ports"]} == ports.keys()


def test_labels_connect_service_policies_stack_and_suite() -> None:
    base, labels = FOLDER / "base", LABEL["matchLabels"]
    deployment = only(base, "Deployment", "dstack-emu")
    assert deployment["spec"]["selector"] == LABEL
    assert pod_of(deployment)["metadata"]["labels"] == labels
    assert only(base, "Service", "dstack-emu")["spec"]["selector"] == labels
    policy = {each["metadata"]["name"]: each["spec"] for each in manifests(base) if each["kind"] == "NetworkPolicy"}
    assert policy["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert (policy["stack"]["podSelector"], policy["stack"]["ingress"][0]["from"]) == (LABEL, [{"podSelector": CLIENT}])
    assert (policy["client"]["podSelector"], policy["client"]["egress"]) == (CLIENT, [{"to": [{"podSelector": LABEL}]}])
    assert policy.keys() == {"default-deny", "dns", "stack", "client"}
    suite = pod_of(only(FOLDER / "suite", "Job", "suite"))
    assert suite["metadata"]["labels"].items() >= CLIENT["matchLabels"].items()


def test_stack_has_the_settings_folders_and_token_of_the_image() -> None:
    table = rows(section(document("docs/configuration.md"), "## The containers"), "variable")
    settings = only(FOLDER / "base", "ConfigMap", "dstack-emu")["data"]
    assert settings.keys() <= {name for row in table for name in code(row[0])}
    service = only(FOLDER / "base", "Service", "dstack-emu")["metadata"]["name"]
    assert settings["EMU_DOMAIN"] == service
    (state,) = re.findall(r"DSTACK_EMU_STATE=(\S+)", document("Dockerfile"))
    for pod in (only(FOLDER / "base", "Deployment", "dstack-emu"), only(FOLDER / "parallel", "Job", "parallel")):
        (stack,) = (each for each in containers(pod_of(pod)) if each["name"] == "stack")
        assert [each["mountPath"] for each in stack["volumeMounts"]] == [state, "/tmp"]
    secret = {"valueFrom": {"secretKeyRef": {"name": "dstack-emu-token", "key": "token"}}}
    suite = pod_of(only(FOLDER / "suite", "Job", "suite"))["spec"]
    deployed = pod_of(only(FOLDER / "base", "Deployment", "dstack-emu"))["spec"]
    for spec in (suite, deployed):
        (container,) = spec["containers"]
        assert {"name": "DSTACK_EMU_TOKEN", **secret} in container["env"]
    addresses = [
        *suite["initContainers"][0]["args"],
        *(each.get("value", "") for each in suite["containers"][0]["env"]),
    ]
    named = [re.fullmatch(r"https?://([\w-]+):(\d+)(/health)?", each) for each in addresses]
    assert {each[1] for each in named if each} == {service}
    assert {int(each[2]) for each in named if each} == {PORTS[name] for name in ("control", "app", "kms-src")}


def test_jobs_end_and_repeat_nothing() -> None:
    for folder, name in (("suite", "suite"), ("parallel", "parallel")):
        spec = only(FOLDER / folder, "Job", name)["spec"]
        assert spec.get("backoffLimit", spec.get("backoffLimitPerIndex")) == 0
        assert spec["activeDeadlineSeconds"] > 0
        assert spec["ttlSecondsAfterFinished"] > 0
        assert spec["template"]["spec"]["restartPolicy"] == "Never"


PAGE = "docs/howto/kubernetes.md"


def test_commands_of_the_page_name_what_is_there() -> None:
    text = "\n".join(block.text for block in blocks(document(PAGE)))
    assert {name for name in re.findall(r"kubernetes/[\w./]+", text) if not (ROOT / name).exists()} == set()
    spaces = {kustomization(FOLDER / root)["namespace"] for root in ROOTS}
    assert set(re.findall(r"--namespace (\S+)|delete namespace (\S+)", text)) >= {(space, "") for space in spaces}
    assert set(re.findall(r"job/(\w+)", text)) == {
        each["metadata"]["name"] for root in ROOTS for each in manifests(FOLDER / root) if each["kind"] == "Job"
    }
    assert set(re.findall(r"/dstack-emu:(\S+)", text)) == {EMULATOR}
    assert set(re.findall(r"generic (\S+) --from-literal=(\w+)=", text)) == {("dstack-emu-token", "token")}


def test_arithmetic_of_the_page_follows_from_the_requests() -> None:
    requests = {
        root: [_requests(pod_of(each)) for each in manifests(FOLDER / root) if each["kind"] in ("Deployment", "Job")]
        for root in ROOTS
    }
    table = {row[0]: row[1:] for row in rows(document(PAGE), "for 1,000 stacks at once")}
    for column, root in enumerate(("parallel", "run")):
        cpu, memory = (sum(each) for each in zip(*requests[root], strict=True))
        objects = len(list(manifests(FOLDER / root))) + (root == "run")  # the Secret is in no file
        fitting = [int(15.5 * 1000 / cpu), int(60 * 1024 / memory), 100 // len(requests[root])]
        nodes = -(-1000 // min(fitting))
        assert [cells[column].replace(",", "") for cells in table.values()] == [
            f"{cpu}m {memory}Mi",
            *map(str, fitting),
            str(nodes),
            f"{cpu} {memory * 1000 / 1024:.0f}",
            f"{nodes * 16} {nodes * 64}",
            str(objects * (1000 if root == "run" else 1)),
            f"{nodes * 207 / 1000:.1f} GB",
        ]


def _requests(pod: Manifest) -> tuple[int, int]:
    """What a scheduler reserves for a pod, in thousandths of a core and MiB: its containers and sidecars."""
    running = [
        each["resources"]["requests"]
        for each in containers(pod)
        if each in pod["spec"]["containers"] or each.get("restartPolicy") == "Always"
    ]
    cpu, memory = ([each[name] for each in running] for name in ("cpu", "memory"))
    return sum(int(each.removesuffix("m")) for each in cpu), sum(int(each.removesuffix("Mi")) for each in memory)


# ---- with the programs of `make kubernetes`

TOOLS = os.environ.get("DSTACK_EMU_KUBERNETES", "")
"""The folder of `make kubernetes`: a venv with kubernetes-validate, and kubectl beside it."""
has_tools = pytest.mark.skipif(not TOOLS, reason="DSTACK_EMU_KUBERNETES is not set: `make kubernetes` sets it")
HAS_KUBECTL = bool(TOOLS) and (ROOT / TOOLS / "kubectl").exists()
VERSIONS = ("1.29", "1.33", "1.37")
"""The oldest release of Kubernetes that has sidecars, one between, and the newest whose schemas are there."""


def _built(folder: Path) -> str:
    """What kubectl makes of a folder."""
    command = [str(ROOT / TOOLS / "kubectl"), "kustomize", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def _validate(file: Path, version: str) -> "subprocess.CompletedProcess[str]":
    program = str(ROOT / TOOLS / "bin/kubernetes-validate")
    command = [program, "--strict", "--kubernetes-version", version, str(file)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@has_tools
@pytest.mark.skipif(not HAS_KUBECTL, reason="`make kubernetes` has kubectl for Linux on x86-64 alone")
@pytest.mark.parametrize("root", ROOTS)
def test_kubectl_puts_together_what_is_listed(root: str) -> None:
    objects = {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(_built(FOLDER / root))}
    listed = kustomization(FOLDER / root)
    (image,) = listed["images"]
    expected = json.dumps(list(manifests(FOLDER / root)))
    for each in json.loads(
        expected.replace('"image": "dstack-emu"', f'"image": "{image["newName"]}:{image["newTag"]}"')
    ):
        if each["kind"] != "Namespace":
            each["metadata"]["namespace"] = listed["namespace"]
        assert objects.pop((each["kind"], each["metadata"]["name"])) == each
    assert objects == {}


@has_tools
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("root", ROOTS)
def test_kubernetes_has_these_fields(root: str, version: str, tmp_path: Path) -> None:
    file = tmp_path / "all.yaml"
    file.write_text(_built(FOLDER / root) if HAS_KUBECTL else yaml.safe_dump_all(manifests(FOLDER / root)))
    done = _validate(file, version)
    assert done.returncode == 0, done.stdout + done.stderr


@has_tools
@pytest.mark.parametrize(
    ("path", "value", "refusal"),
    [
        (("spec", "template", "spec", "readOnly"), True, "readOnly"),
        (("spec", "replicas"), "1", "'1' is not of type 'integer'"),
    ],
)
def test_unknown_field_and_wrong_type_are_found(
    path: tuple[str, ...], value: Any, refusal: str, tmp_path: Path
) -> None:
    deployment = only(FOLDER / "base", "Deployment", "dstack-emu")
    place: Any = deployment
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump(deployment))
    done = _validate(file, VERSIONS[-1])
    assert done.returncode != 0
    assert refusal in done.stdout + done.stderr
