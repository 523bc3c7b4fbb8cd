"""The compose file of a machine as it is changed for the engine of this host, and what is said without an engine."""

import copy
import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import pytest

from dstack_emu.deployment.compose_reads import require_own_files
from dstack_emu.deployment.config import StackConfig
from dstack_emu.deployment.container_engine import passed_on
from dstack_emu.deployment.errors import StackError
from dstack_emu.deployment.guest_compose import Adapted, GuestFolders, GuestProject, adapt
from dstack_emu.simulator.errors import GuestError
from dstack_emu.stack import Stack

VM = Path("/state/vms/1")
PROJECT = GuestProject(
    "dstack-emu-0",
    {"dstack-emu.machine": "1"},
    GuestFolders(VM / "run", VM / "dstack", VM / "root"),
    frozenset({("tcp", 80), ("udp", 53)}),
)
# What `docker compose config --format json` prints, with the members that matter here.
SERVICE: dict[str, Any] = {"image": "app", "networks": {"default": None}}
DOCUMENT: dict[str, Any] = {"services": {"main": SERVICE}, "networks": {"default": {"name": "x_default"}}}


def adapted(**service: Any) -> Adapted:
    document = copy.deepcopy(DOCUMENT)
    document["services"]["main"] |= service
    return adapt(document, PROJECT, {"tcp": 40000, "udp": 40001}.__getitem__)


def bind(source: str) -> dict[str, Any]:
    return {"type": "bind", "source": source, "target": "/t"}


@pytest.mark.parametrize(
    ("guest", "host"),
    [
        ("/var/run/dstack.sock", "run/dstack.sock"),
        ("/run/tappd.sock", "run/tappd.sock"),
        ("/var/run/dstack", "run"),
        ("/var/run/dstack/dstack.sock", "run/dstack.sock"),
        ("/dstack/user_config", "dstack/user_config"),
        (f"{VM}/dstack/x", "dstack/x"),  # a relative path, which Compose has resolved
        ("/etc/passwd", "root/etc/passwd"),
        (f"{VM}/shared", "root/shared"),  # `../shared`
        ("/dstack/../etc", "root/etc"),
        (f"{VM}/dstack/../../2/dstack", "root/state/vms/2/dstack"),
        ("/../..//etc/./x", "root/etc/x"),
        ("/", "root"),
    ],
)
def test_path_of_the_guest_is_one_in_the_folder_of_the_machine(guest: str, host: str) -> None:
    (volume,) = adapted(volumes=[bind(guest)]).document["services"]["main"]["volumes"]
    assert volume["source"] == str(VM / host)


def test_mapped_ports_of_the_guest_are_published_on_free_ports_and_others_are_not() -> None:
    def port(number: str, **members: Any) -> dict[str, Any]:
        return {"target": 8080, "published": number, "protocol": "tcp"} | members

    ports = [port("80"), port("81"), port("53", protocol="udp"), {"target": 1, "protocol": "tcp"}]
    found = adapted(ports=ports)
    assert found.published == {("tcp", 80): 40000, ("udp", 53): 40001}
    assert [each["published"] for each in found.document["services"]["main"]["ports"]] == ["40000", "40001"]
    assert {each["host_ip"] for each in found.document["services"]["main"]["ports"]} == {"127.0.0.1"}
    assert adapted(ports=[port("80", host_ip="127.0.0.1")]).published == {}  # it is the loopback of the guest
    document = copy.deepcopy(DOCUMENT)
    document["services"]["main"] |= {
        "ports": [port("81"), port("54", protocol="udp"), {"target": 1, "protocol": "tcp"}]
    }
    behind_gateway = adapt(document, dataclasses.replace(PROJECT, has_gateway=True), {"tcp": 40000}.__getitem__)
    assert behind_gateway.published == {("tcp", 81): 40000}


def test_names_are_those_of_the_project_and_everything_has_its_labels() -> None:
    document = copy.deepcopy(DOCUMENT) | {"volumes": {"data": {"name": "fixed"}}}
    main = document["services"]["main"]
    main |= {"container_name": "app", "labels": {"a": "b"}, "build": {"context": "/src", "labels": {"c": "d"}}}
    found = adapt(document, PROJECT, int).document
    main = found["services"]["main"]
    assert "container_name" not in main
    assert main["networks"] == {"default": {"aliases": ["app"]}}
    assert main["labels"] == {"a": "b", "dstack-emu.machine": "1"}
    assert main["build"] == {"context": str(VM / "root/src"), "labels": {"c": "d", "dstack-emu.machine": "1"}}
    assert main["extra_hosts"] == ["host.docker.internal=host-gateway"]
    for kind, key in (("volumes", "data"), ("networks", "default")):
        assert found[kind][key] == {"name": f"dstack-emu-0_{key}", "labels": {"dstack-emu.machine": "1"}}


@pytest.mark.parametrize(
    "refused",
    [
        {"privileged": True},
        {"network_mode": "host"},
        {"pid": "container:x"},
        {"devices": [{"source": "/dev/kvm"}]},
        {"network_mode": "bridge-of-another-project"},
        {"use_api_socket": True},
        {"provider": {"type": "x"}},
        {"cap_add": ["CAP_SYS_ADMIN"]},
        {"security_opt": ["seccomp:./profile.json"]},
        {"post_start": [{"command": ["x"], "privileged": True}]},
        {"volumes_from": ["container:x"]},
        {"volumes": [bind("/var/run/docker.sock")]},
        {"volumes": [bind("/run/docker.sock")]},
    ],
    ids=str,
)
def test_service_that_would_have_this_host_is_refused(refused: dict[str, Any]) -> None:
    with pytest.raises(GuestError, match=r"^service main: .* to run the app here$"):
        adapted(**refused)
    adapted(volumes=[bind("/run/docker")], network_mode="none")
    adapted(cap_add=["NET_ADMIN"], security_opt=["seccomp:unconfined"], network_mode="service:main")


@pytest.mark.parametrize(
    "refused",
    [
        {"ssh": ["default"]},
        {"network": "host"},
        {"cache_to": ["type=local,dest=/home"]},
        {"cache_from": ["type=local,src=x"]},
        {"additional_contexts": {"x": "oci-layout:///home"}},
        {"dockerfile": "/etc/passwd"},
        {"dockerfile": "../../../etc/passwd"},
    ],
    ids=str,
)
def test_build_that_would_read_this_host_is_refused(refused: dict[str, Any]) -> None:
    with pytest.raises(GuestError, match=r"^service main: build: .* to run the app here$"):
        adapted(build={"context": f"{VM}/dstack"} | refused)
    build = {
        "context": "/src",
        "additional_contexts": {"x": "/etc", "y": "docker-image://z"},
        "dockerfile": "../x",
        "args": {"HTTP_PROXY": None, "A": "b"},
    }
    found = adapted(build=build).document["services"]["main"]["build"]
    assert found["additional_contexts"] == {"x": str(VM / "root/etc"), "y": "docker-image://z"}
    assert found["args"] == {"A": "b"}


def test_variable_without_a_value_is_none_of_this_host() -> None:
    found = adapted(environment={"HTTP_PROXY": None, "DOCKER_AUTH_CONFIG": None, "A": "b"}, env_file=[{"path": "x"}])
    assert found.document["services"]["main"]["environment"] == {"A": "b"}
    assert "env_file" not in found.document["services"]["main"]
    for kind in ("configs", "secrets"):
        for refused in ({"environment": "DOCKER_AUTH_CONFIG"}, {"external": True}):
            with pytest.raises(GuestError, match=rf"^{kind}: x: (environment: DOCKER_AUTH_CONFIG|external): "):
                adapt(copy.deepcopy(DOCUMENT) | {kind: {"x": refused}}, PROJECT, int)
        adapt(copy.deepcopy(DOCUMENT) | {kind: {"x": {"environment": "APP_TOKEN"}}}, PROJECT, int)


def test_link_of_a_script_to_a_file_of_this_host_is_refused(tmp_path: Path) -> None:
    folders = GuestFolders(tmp_path / "run", tmp_path / "vm/dstack", tmp_path / "vm/root")
    folders.home.mkdir(parents=True)
    (folders.home / "link").symlink_to("/etc/passwd")
    (folders.home / "context").symlink_to("/etc")
    (folders.home / "own").write_text("")
    link, context, own = (str(folders.home / name) for name in ("link", "context", "own"))
    for document, text in (
        ({"services": {"a": {"volumes": [bind(link)]}}}, "service a: /t: it is a link"),
        ({"services": {"a": {"build": {"context": context}}}}, "service a: build: it is a link"),
        ({"services": {"a": {"build": {"context": str(folders.home), "dockerfile": "link"}}}}, ".*dockerfile: it is a"),
        ({"services": {"a": {"build": {"additional_contexts": {"x": context}}}}}, ".*additional_contexts: it is a"),
        ({"configs": {"c": {"file": link}}}, "configs: c: it is a link"),
        ({"secrets": {"s": {"file": link}}}, "secrets: s: it is a link"),
    ):
        with pytest.raises(GuestError, match=text):
            folders.require_inside(document)
    folders.require_inside({"services": {"a": {"volumes": [bind(own)]}}, "configs": {"c": {"file": own}}})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("services: {a: {env_file: /etc/passwd}}", "env_file: /etc/passwd: Compose would read it on this host"),
        ("services: {a: {env_file: [own, {path: ../x, required: false}]}}", "env_file: ../x: Compose would"),
        ("services: {a: {env_file: '${HOME}/x'}}", "env_file: ${HOME}/x: Compose would"),
        ("services: {a: {env_file: ~/x}}", "env_file: ~/x: Compose would"),
        ("services: {a: {env_file: link}}", "env_file: link: it is a link to a file of this host"),
        ("services: {a: {env_file: folder/passwd}}", "env_file: folder/passwd: it is a link"),
        ("services: {a: {label_file: /etc/passwd}}", "label_file: /etc/passwd: Compose would"),
        ("x: &x {env_file: /etc/passwd}\nservices: {a: {<<: *x}}", "env_file: /etc/passwd: Compose would"),
        ("x: &x env_file\nservices: {a: {*x : /etc/passwd}}", "env_file: /etc/passwd: Compose would"),
        ("services: {a: {}}\n---\nservices: {a: {env_file: /etc/passwd}}", "env_file: /etc/passwd: Compose would"),
        ("services: {a: {!!binary ZW52X2ZpbGU= : /etc/passwd}}", "!!binary is not read"),
        ("services: {a: {env_file: !!binary L2V0Yy9ob3N0cw==}}", "!!binary is not read"),
        ("services: {a: {env_file: !x /etc/passwd}}", "env_file: /etc/passwd: Compose would"),
        ("services: {a: {extends: {file: /etc/x.yaml, service: b}}}", "extends: /etc/x.yaml: Compose would"),
        ("include: [/etc/x.yaml]", "include: /etc/x.yaml: Compose would"),
        ("include: [{path: own.yaml, project_directory: /etc}]", "include: /etc: Compose would"),
        ("include: ['https://host/x.git']", "include: https://host/x.git: Compose would"),
        ("include: [github.com/x/y]", "include: github.com/x/y: Compose would"),
        ("include: [nested/one.yaml]", "env_file: ../../x: Compose would"),
        ("services: {a: {extends: {file: nested/two.yaml, service: b}}}", "/dstack/nested/two.yaml: "),
        ("services: {a: [", "docker_compose_file: "),
    ],
)
def test_file_of_this_host_that_compose_would_read_is_refused(text: str, why: str, tmp_path: Path) -> None:
    home = tmp_path / "dstack"
    (home / "nested").mkdir(parents=True)
    (home / "link").symlink_to("/etc/passwd")
    (home / "folder").symlink_to("/etc")
    (home / "own.yaml").write_text("services: {b: {env_file: own}}")
    (home / "nested/one.yaml").write_text("services: {b: {env_file: ../../x}}")
    (home / "nested/two.yaml").write_text("services: [")
    file = home / "docker-compose.yaml"
    file.write_text(text)
    with pytest.raises(GuestError, match=re.escape(why)):
        require_own_files(file, home)
    file.write_text(
        "include: [own.yaml]\nservices: {a: &a {env_file: [own, absent]}, c: {<<: *a, extends: {service: a}}}"
    )
    require_own_files(file, home)
    file.unlink()
    file.symlink_to("/etc/passwd")
    with pytest.raises(GuestError, match="docker_compose_file: it is a link"):
        require_own_files(file, home)


@pytest.mark.parametrize(
    "refused",
    [
        {"external": True},
        {"driver_opts": {"type": "none", "o": "bind", "device": "home"}},
        {"driver_opts": {"device": "/home"}},
        {"driver": "host"},
    ],
    ids=str,
)
def test_volume_or_network_of_this_host_is_refused(refused: dict[str, Any]) -> None:
    with pytest.raises(GuestError, match=r"^volumes: data: .* to run the app here$"):
        adapt(copy.deepcopy(DOCUMENT) | {"volumes": {"data": refused}}, PROJECT, int)
    adapt(copy.deepcopy(DOCUMENT) | {"volumes": {"data": {"driver_opts": {"type": "tmpfs"}}}}, PROJECT, int)


def test_variables_that_configure_the_client_of_this_host_are_not_passed_on() -> None:
    given = dict.fromkeys(("PATH", "HOME", "DOCKER_HOST", "LD_PRELOAD", "COMPOSE_FILE", "https_proxy", "GODEBUG"), "x")
    assert passed_on(given | {"APP_TOKEN": "t", "COMPOSE_PROFILES": "p", "PATHS": "q"}) == {
        "APP_TOKEN": "t",
        "COMPOSE_PROFILES": "p",
        "PATHS": "q",
    }


async def test_stack_without_an_engine_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = StackConfig.on_free_ports(vmm=True, vmm_workload="docker")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StackError) as error:
        await Stack(settings).__aenter__()
    assert str(error.value) == (
        "vmm: `docker`: No such file or directory: install the Docker CLI with its compose plugin, put it on PATH, "
        "or choose --vmm-workload process"
    )
    client = tmp_path / "docker"
    client.write_text('#!/bin/sh\nif [ "$1" = compose ]; then echo unknown command >&2; exit 1; fi\necho 20.10\n')
    os.chmod(client, 0o755)
    with pytest.raises(
        StackError, match=r"^vmm: `docker compose version`: install the compose plugin .* unknown command$"
    ):
        await Stack(settings).__aenter__()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"vmm": True, "vmm_workload": "podman"}, "vmm_workload: process or docker expected, got 'podman'"),
        ({"vmm_workload": "docker"}, "vmm_workload and vmm_script_image are settings of a VMM.*add --vmm"),
        ({"vmm_script_image": "x"}, "vmm_workload and vmm_script_image are settings of a VMM.*add --vmm"),
    ],
    ids=str,
)
async def test_settings_of_a_vmm_that_cannot_be_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(StackError, match=text):
        await Stack(StackConfig.on_free_ports(**settings)).__aenter__()
