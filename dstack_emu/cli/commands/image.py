"""`dstack-emu image`: OS images as a thing to hold: build, measure, compare, serve."""

import argparse
import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from aiohttp import web

from dstack_emu.attest.errors import FormatError
from dstack_emu.attest.eventlog import TdxEvent, replay_register
from dstack_emu.attest.image import Registers
from dstack_emu.attest.os_image import cache_key, encode_cache_entry
from dstack_emu.attest.vmconfig import VmConfig
from dstack_emu.cli.commands.common import UsageError, listen_address, say, stop_on_signals
from dstack_emu.cli.commands.guest_options import add_seed, cpu_count, memory_size
from dstack_emu.simulator.image import ImageParts, OsImage, is_bootable
from dstack_emu.simulator.image_files import archive, disagreements, fill_cache, load_image, save_image
from dstack_emu.simulator.seed import Seed
from dstack_emu.transport.listen import bind_tcp, serve
from dstack_emu.transport.ports import IMAGE_PORT

DESCRIPTION = (
    "OS images as dstack has them: a directory whose sha256sum.txt names it (os_image_hash is its SHA-256), with the "
    "measurement document by which a verifier recomputes the registers of a VM that boots it. `agent --image-dir` and "
    "`up --image-dir` boot from one."
)

_TITLES: Final = {
    "build": "write an image directory, of files or made up of a name and a seed",
    "measure": "registers of a VM that boots an image",
    "diff": "which part of two images differs, and in which register it shows; exit 1 where one does",
    "serve": "serve images as verifiers download them",
}

_PARTS: Final = {
    # part: (members of the measurement document, registers it shows in)
    "firmware": (("mrtd_single_pass", "mrtd_two_pass"), ("mrtd",)),
    "firmware's memory layout": (("td_hob",), ("rtmr0",)),
    "kernel": (("kernel_authenticode",), ("rtmr1",)),
    "command line": (("cmdline_sha384",), ("rtmr2",)),
    "initrd": (("initrd_sha384",), ("rtmr2",)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the four sub-commands."""
    choice = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions = {name: choice.add_parser(name, help=title, description=title) for name, title in _TITLES.items()}
    for action in actions.values():
        action.add_argument("-v", "--verbose", action="count", default=argparse.SUPPRESS, help="say more")

    build = actions["build"]
    build.add_argument("folder", type=Path, metavar="DIR", help="where it goes")
    build.add_argument("--name", default="dstack-emu", metavar="NAME", help="what is made up, is of it (%(default)s)")
    build.add_argument("--version", default="0.5.11", metavar="TEXT", help="its version (%(default)s)")
    add_seed(build)
    for part, what in (("kernel", "a bzImage"), ("initrd", "an initramfs"), ("firmware", "an OVMF")):
        build.add_argument(f"--{part}", type=Path, metavar="FILE", help=f"{what} instead of made-up bytes")
    build.add_argument("--cmdline", metavar="TEXT", help="the kernel's command line, with its dstack.rootfs_hash=")
    build.add_argument("--force", action="store_true", help="replace the image that is there")

    measure = actions["measure"]
    measure.add_argument("folder", type=Path, metavar="DIR", help="an image directory")
    measure.add_argument("--cpus", type=cpu_count, default=2, metavar="N", help="CPUs of the VM (%(default)s)")
    measure.add_argument(
        "--memory", type=memory_size, default=2 * 1024**3, metavar="SIZE", help="its memory: 2G, or 2816M and more"
    )
    measure.add_argument("--qemu", default="8.2.2", metavar="VERSION", help="the QEMU that starts it (%(default)s)")
    measure.add_argument("--gpus", type=_count, default=0, metavar="N", help="GPUs that are passed through")
    measure.add_argument("--nics", type=_count, default=1, metavar="N", help="network cards (%(default)s)")
    measure.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="put image and registers into this cache of a KMS or verifier, for the same VM of the legacy variant",
    )

    diff = actions["diff"]
    diff.add_argument("a", type=Path, metavar="A", help="an image directory")
    diff.add_argument("b", type=Path, metavar="B", help="another one")

    serving = actions["serve"]
    serving.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="image directories")
    serving.add_argument(
        "--listen",
        type=listen_address,
        default=("127.0.0.1", IMAGE_PORT),
        metavar="HOST:PORT",
        help=f"address (127.0.0.1:{IMAGE_PORT})",
    )
    for action in actions.values():
        action.add_argument("--json", action="store_true", help="print JSON, and nothing else, on stdout")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) > 64:
        raise argparse.ArgumentTypeError(f"a number from 0 to 64 expected, got {text!r}")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Run one of the four."""
    action = {"build": _build, "measure": _measure, "diff": _diff, "serve": _serve}[arguments.action]
    try:
        return action(arguments)
    except FormatError as error:
        raise UsageError(str(error)) from error


# ---- build


def _build(arguments: argparse.Namespace) -> int:
    folder: Path = arguments.folder
    cmdline: str | None = arguments.cmdline
    if cmdline is not None and not re.search(r"(?:^|\s)dstack\.rootfs_hash=[0-9a-fA-F]{64}(?:\s|$)", cmdline):
        raise UsageError("--cmdline: dstack.rootfs_hash=<64 hex digits> expected in it: it binds the root filesystem")
    parts = ImageParts(
        firmware=_file(arguments.firmware, "--firmware"),
        kernel=_file(arguments.kernel, "--kernel"),
        initrd=_file(arguments.initrd, "--initrd"),
        cmdline=cmdline,
    )
    if parts.kernel is not None and not is_bootable(parts.kernel):
        say(f"{arguments.kernel} is no kernel that a firmware boots (a PE): its digest is made up")
    if parts.firmware is not None:
        say(f"{arguments.firmware}: MRTD and memory layout are not computed from a firmware: its MRTDs are made up")
    image = OsImage.from_seed(Seed.of(arguments.seed).derive, arguments.name, arguments.version, parts)
    save_image(image, folder, replace=arguments.force)
    if arguments.json:
        print(json.dumps({"path": str(folder.absolute()), "os_image_hash": image.os_image_hash.hex()}))
    else:
        print(f"{folder}: os_image_hash {image.os_image_hash.hex()}")
    return 0


def _file(path: Path | None, option: str) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise UsageError(f"{option}: cannot read {path}: {error.strerror}") from error


# ---- measure


def _measure(arguments: argparse.Namespace) -> int:
    image = _load(arguments.folder)
    vm_config = image.vm_config(
        arguments.cpus, arguments.memory, num_gpus=arguments.gpus, num_nics=arguments.nics, qemu_version=arguments.qemu
    )
    registers, log = image.boot(vm_config)
    cached: Path | None = None
    if arguments.cache is not None:
        vm_config = replace(vm_config, tdx_attestation_variant="legacy")
        cached = fill_cache(image, arguments.cache, cache_key(vm_config), encode_cache_entry(registers))
    if arguments.json:
        print(json.dumps(_measured(image, vm_config, registers, log, cached)))
        return 0
    print(f"os_image_hash {image.os_image_hash.hex()}")
    machine = f"{arguments.cpus} CPUs, {arguments.memory >> 20} MiB, QEMU {arguments.qemu}"
    print(f"VM            {vm_config.image}, {machine}")
    for name, value in asdict(registers).items():
        print(f"{name:<13} {value.hex()}")
    if getattr(arguments, "verbose", 0):
        for row in _rows(log):
            name = row["event"] or "-"
            print(f"  imr {row['imr']}  {row['event_type']:08x}  {name:<11}  {row['digest']}  -> {row['after']}")
    if cached is not None:
        print(f"cached        {cached}")
    return 0


def _measured(
    image: OsImage, vm_config: VmConfig, registers: Registers, log: Sequence[TdxEvent], cached: Path | None
) -> dict[str, Any]:
    document: dict[str, Any] = {
        "os_image_hash": image.os_image_hash.hex(),
        "vm_config": vm_config.to_json(),
        **{name: value.hex() for name, value in asdict(registers).items()},
        "events": _rows(log),
    }
    return document if cached is None else document | {"cached": str(cached.absolute())}


def _rows(log: Sequence[TdxEvent]) -> list[dict[str, Any]]:
    """The boot's events, each with its register's value after it."""
    return [
        {
            "imr": event.imr,
            "event_type": event.event_type,
            "event": event.event,
            "digest": event.digest.hex(),
            "after": replay_register(log[: count + 1], event.imr).hex(),
        }
        for count, event in enumerate(log)
    ]


def _load(folder: Path) -> OsImage:
    image = load_image(folder)
    for what in disagreements(image):
        say(f"{folder}: {what}")
    return image


# ---- diff


def _diff(arguments: argparse.Namespace) -> int:
    a, b = _load(arguments.a), _load(arguments.b)
    changes: list[dict[str, Any]] = [
        {
            "part": part,
            "registers": list(registers),
            "a": {name: getattr(a.measurement, name).hex() for name in members},
            "b": {name: getattr(b.measurement, name).hex() for name in members},
        }
        for part, (members, registers) in _PARTS.items()
        if any(getattr(a.measurement, name) != getattr(b.measurement, name) for name in members)
    ]
    files = sorted(name for name in a.files.keys() | b.files.keys() if a.files.get(name) != b.files.get(name))
    if arguments.json:
        hashes = {"a": a.os_image_hash.hex(), "b": b.os_image_hash.hex()}
        print(json.dumps({"same": not files, "os_image_hash": hashes, "files": files, "changes": changes}))
        return 1 if files else 0
    if not files:
        print(f"the same image: os_image_hash {a.os_image_hash.hex()}")
        return 0
    print(f"os_image_hash  {a.os_image_hash.hex()}\n               {b.os_image_hash.hex()}")
    print(f"files          {', '.join(files)}")
    for change in changes:
        print(f"{change['part']}: shows in {', '.join(change['registers']).upper()}")
        for name, value in change["a"].items():
            print(f"  {name}\n    {value}\n    {change['b'][name]}")
    if not changes:
        print("no register differs: only what nobody measures")
    return 1


# ---- serve


def _serve(arguments: argparse.Namespace) -> int:
    images: dict[str, bytes] = {}
    for folder in arguments.folders:
        image = _load(folder)
        images[image.os_image_hash.hex()] = archive(image.files)
    host, port = arguments.listen
    return asyncio.run(_serve_images(images, bind_tcp(host, port, setting="--listen HOST:PORT"), arguments.json))


async def _serve_images(images: Mapping[str, bytes], sock: Any, as_json: bool) -> int:
    stop = stop_on_signals()
    server = await serve(images_app(images), sock)
    try:
        template = f"{server.url}/mr_{{OS_IMAGE_HASH}}.tar.gz"
        urls = {name: f"{server.url}/mr_{name}.tar.gz" for name in images}
        if as_json:
            print(json.dumps({"url": server.url, "download_url": template, "images": urls}), flush=True)
        else:
            print("\n".join((*urls.values(), f"download URL: {template}. Ctrl-C stops it.")), flush=True)
        await stop.wait()
    finally:
        await server.close()
    return 0


def images_app(images: Mapping[str, bytes]) -> web.Application:
    """Serve archives by hash, at the paths of upstream's default URLs (verifier, KMS) and at the root."""

    async def download(request: web.Request) -> web.Response:
        content = images.get(request.match_info["hash"])
        if content is None:
            raise web.HTTPNotFound
        return web.Response(body=content, content_type="application/gzip")

    async def health(request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    app = web.Application()
    for path in ("/mr_{hash}.tar.gz", "/os-images/mr_{hash}.tar.gz", "/{hash:[0-9a-f]{64}}.tar.gz"):
        app.router.add_get(path, download)
    app.router.add_get("/health", health)
    return app
