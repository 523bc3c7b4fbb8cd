"""The reference servers: the least code that aiohttp allows, each in a process of its own.

`constant FILE` answers with the bytes of a file over a unix socket. `kms FILE` reads a JSON description (`Inner`) and
serves mTLS like a KMS: every POST makes the requests that a KMS has to make, but derives and verifies nothing.
"""

import asyncio
import json
import signal
import ssl
import sys
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import aiohttp
from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.Response]]


@dataclass(frozen=True, slots=True)
class Inner:
    """The requests of a bare KMS in every call: to webhooks (URL, body), and for documents, all at once.

    `certs` is the folder with the certificates of an emulated KMS, `answer` the body of every answer.
    """

    certs: str
    questions: list[tuple[str, str]]
    documents: list[str]
    answer: str

    def to_json(self) -> str:
        """Write the description for the other process."""
        return json.dumps(asdict(self))


async def _serve_constant(body: bytes) -> None:

    async def answer(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=body, content_type="application/json")

    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        path = str(Path(folder, "bare.sock"))
        runner = await _runner(answer)
        await web.UnixSite(runner, path).start()
        await _until_stopped(runner, {"socket": path})


async def _serve_kms(description: bytes) -> None:
    inner = Inner(**json.loads(description))
    etags: dict[str, str] = {}
    # A KMS takes no decision from a connection that was used before: docs/decisions/http.md.
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:

        async def request_decision(url: str, body: str) -> None:
            async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as response:
                if (await response.json())["isAllowed"] is not True:
                    raise web.HTTPForbidden(text=await response.text())

        async def revalidate(url: str) -> None:
            headers = {"If-None-Match": etags[url]} if url in etags else {}
            async with session.get(url, headers=headers) as response:
                await response.read()
                etags[url] = response.headers["ETag"]

        async def answer(request: web.Request) -> web.Response:
            await request.read()
            await asyncio.gather(*map(revalidate, inner.documents))
            for url, body in inner.questions:
                await request_decision(url, body)
            return web.Response(text=inner.answer, content_type="application/json")

        runner = await _runner(answer)
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=_tls(Path(inner.certs)))
        await site.start()
        await _until_stopped(runner, {"port": runner.addresses[0][1]})


def _tls(certs: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certs / "rpc.crt", certs / "rpc.key")
    context.load_verify_locations(certs / "tmp-ca.crt")
    context.verify_mode = ssl.CERT_OPTIONAL
    return context


async def _runner(handler: Handler) -> web.AppRunner:
    app = web.Application()
    app.router.add_post("/{method:.*}", handler)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    return runner


async def _until_stopped(runner: web.AppRunner, ready: dict[str, object]) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    print(json.dumps(ready), flush=True)
    await stop.wait()
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run({"constant": _serve_constant, "kms": _serve_kms}[sys.argv[1]](Path(sys.argv[2]).read_bytes()))
