"""The services that belong to no KMS and no trust domain of a stack: its PCCS and its verifier."""

from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Final

from dstack_emu.deployment.context import StackContext
from dstack_emu.observability.http_call import HttpCall
from dstack_emu.observability.recorders import verdict_recorder
from dstack_emu.simulator.pccs import pccs_app
from dstack_emu.transport.http import Response
from dstack_emu.transport.image_store import ImageStore
from dstack_emu.transport.listen import Server
from dstack_emu.transport.ports import IMAGE_URL
from dstack_emu.verifier.server import verifier_app
from dstack_emu.verifier.service import Verifier

IMAGE_TIMEOUT: Final = 30.0
"""The timeout of the download of an OS image in seconds."""


async def serve_pccs(context: StackContext) -> Server:
    """Serve the PCCS; the caller closes the server."""
    intel = context.intel

    async def answer_expired(call: HttpCall) -> Response:
        """Answer with documents that have expired: the PCCS's handlers read the state, and never wait."""
        before = intel.state
        intel.state = replace(
            before,
            tcb_info_dating="expired",
            qe_identity_dating="expired",
            pck_crl_dating="expired",
            root_ca_crl_dating="expired",
        )
        try:
            return await call.proceed()
        finally:
            intel.state = before

    return await context.serve("pccs", pccs_app(intel), stale=answer_expired)


async def serve_verifier(context: StackContext, closing: AsyncExitStack) -> Server:
    """Serve the verifier, with the KMS's own cache of images; the caller closes the server.

    What else has to be closed is put on `closing`.
    """
    release = context.release_of(None)
    documents = release.measurement_documents
    images = ImageStore(context.state / "images", IMAGE_URL, IMAGE_TIMEOUT, documents=documents)
    closing.push_async_callback(images.close)
    verifier = context.verifier("verifier")
    closing.push_async_callback(verifier.pccs.close)
    observer = verdict_recorder(context.instrumentation.journal)
    app = verifier_app(Verifier(verifier, images, release), observer=observer)
    return await context.serve("verifier", app)
