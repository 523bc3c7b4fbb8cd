"""The KMS that is checked: one start of its program, on a fresh folder."""

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from dstack_emu.attest.issuing import CertificateAuthority, load_authority
from dstack_emu.attest.kdf import load_p256_pem
from dstack_emu.deployment.authorization import plain_url, tls_url
from dstack_emu.deployment.errors import StackError
from dstack_emu.deployment.kms_process import KmsFiles, KmsProcess
from dstack_emu.deployment.kms_toml import KmsSettings
from dstack_emu.kms_check.calls import request
from dstack_emu.kms_check.errors import UnusableError
from dstack_emu.kms_check.world import World
from dstack_emu.transport.listen import bind_tcp

HOST: Final = "127.0.0.1"
WEBHOOK_TIMEOUT: Final = "2s"
"""What the KMS is told to wait for its webhook; a KMS before 0.6 does not know the key, and has no limit."""
KEY_FILES: Final = ("root-ca.key", "root-k256.key", "tmp-ca.key")
"""Upstream's names of the files with root keys, in core.cert_dir."""


class CheckedKms:
    """One start of the program, which `command` runs; with None somebody else starts it.

    `folder` gets its kms.toml, its keys and what it prints.
    """

    def __init__(
        self, world: World, folder: Path, command: str | None, *, wait: float, progress: Callable[[str], None]
    ) -> None:
        port = _free_port()
        context = world.deployment.context
        self._settings = KmsSettings(
            host=HOST,
            port=port,
            cert_dir=folder / "certs",
            image_cache=folder / "images",
            pccs=context.urls["pccs"],
            root_ca=context.root_ca,
            webhook=world.webhook.url,
            site_name="check-kms",
            settings={"auth_api": {"webhook": {"timeout": WEBHOOK_TIMEOUT}}},
            release=world.release,
        )
        self._program = KmsProcess(
            "the KMS",
            self._settings,
            KmsFiles.in_folder(folder),
            url=f"http://{HOST}:{port}",
            agent=f"unix:{world.guest.dstack_sock}",
            command=command,
            patience=wait,
            progress=progress,
        )
        self._ended: asyncio.Task[None] | None = None
        self.url, self.plain_url = tls_url(self._program.url), plain_url(self._program.url)

    async def start(self) -> None:
        """Start it, and wait until it is in its onboard phase; raise `UnusableError`."""
        try:
            await self._program.start()
            phase = await self._program.answers()
        except StackError as error:
            raise UnusableError(str(error)) from error
        if phase != "onboard":
            raise UnusableError("the KMS has keys already: start a fresh one, with an empty core.cert_dir")
        self._ended = asyncio.create_task(self._program.ended())

    async def stop(self) -> None:
        """End the program."""
        if self._ended is not None:
            self._ended.cancel()
            await asyncio.gather(self._ended, return_exceptions=True)
        await self._program.stop()

    def require_running(self) -> None:
        """Raise `UnusableError` with the program's last output if it has ended."""
        if self._ended is not None and self._ended.done():
            try:
                self._ended.result()
            except StackError as error:
                raise UnusableError(str(error)) from error

    async def finish(self) -> None:
        """End its onboard phase, and wait until it answers over TLS; raise `UnusableError`."""
        answer = await request("GET", f"{self.plain_url}/finish", patience=30)
        if not answer.is_success:
            raise UnusableError(f"the KMS does not end its onboard phase: /finish: {answer.shown}")
        try:
            await self._program.reached_runtime()
        except StackError as error:
            raise UnusableError(str(error)) from error

    def stored_keys(self) -> list[str]:
        """Return the names of the root keys in its folder."""
        return [name for name in KEY_FILES if (self._settings.cert_dir / name).exists()]


def authority_in(body: dict[str, Any]) -> CertificateAuthority:
    """Return the temporary CA in an answer of GetTempCaCert; raise `FormatError`."""
    key = load_p256_pem(str(body.get("temp_ca_key")), "temp_ca_key")
    return load_authority(str(body.get("temp_ca_cert")), key, "temp_ca_cert")


def _free_port() -> int:
    with contextlib.closing(bind_tcp(HOST, 0, listen=False)) as sock:
        port: int = sock.getsockname()[1]
        return port
