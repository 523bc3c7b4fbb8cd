"""What a KMS with keys serves over TLS: the KMS RPCs, `/health`, `/metrics`, and a page for browsers.

Source: dstack `kms/src/main.rs` at 312dc605.
"""

import ssl
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from pathlib import Path

from dstack_emu.attest.errors import AttestError
from dstack_emu.kms_emu.call_log import early_clock, log_refusal
from dstack_emu.kms_emu.caller import caller_of
from dstack_emu.kms_emu.config import AdminTls, Tls
from dstack_emu.kms_emu.dependencies import KmsDependencies
from dstack_emu.kms_emu.errors import KmsConfigError, KmsError
from dstack_emu.kms_emu.metrics import AttestationMetrics
from dstack_emu.kms_emu.onboard_phase import health
from dstack_emu.kms_emu.pages import runtime_page
from dstack_emu.kms_emu.service import Caller, KmsService, kms_table
from dstack_emu.transport.events import EventLog
from dstack_emu.transport.html import content_security_policy
from dstack_emu.transport.http import ROCKET_HEADERS, Application, Handler, Middleware, Request, Response, status_page
from dstack_emu.transport.listen import ServerTlsContext
from dstack_emu.transport.pccs_client import AttestationVerifier
from dstack_emu.transport.prpc_server import RpcStatuses, add_prpc


def runtime_app(
    service: KmsService, deps: KmsDependencies, metrics: AttestationMetrics, middlewares: Sequence[Middleware] = ()
) -> Application:
    """Make the application of the runtime phase; `metrics` counts its calls."""
    release = deps.release
    version = ("X-App-Version", f"v{release.version} ({release.revision})")
    app = Application(headers=(*ROCKET_HEADERS, version), middlewares=middlewares)
    app.add("GET", "/", _page_of(deps))
    app.add("GET", "/health", health)
    if deps.core.metrics.enabled:
        app.add("GET", "/metrics", metrics.render)
    who = caller(deps.verifier, deps.log)
    add_prpc(
        app,
        "/prpc",
        kms_table(service),
        who,
        errors=(KmsError,),
        answered=metrics.record,
        statuses=RpcStatuses.of(release),
    )
    return app


def _page_of(deps: KmsDependencies) -> Handler:
    """Return the handler of `/`: a page for browsers, and for other programs upstream's 404."""

    async def page(request: Request) -> Response:
        if "text/html" not in request.headers.get("Accept", ""):
            return status_page(HTTPStatus.NOT_FOUND, request)
        origin = f"https://{request.headers.get('Host', 'HOST:PORT')}"
        text = runtime_page(deps.core.site_name, version=deps.release.version, origin=origin)
        return Response.of(text, "text/html", Content_Security_Policy=content_security_policy())

    return page


def caller(verifier: AttestationVerifier, log: EventLog) -> Callable[[Request], Awaitable[Caller]]:
    """Return the function that identifies a caller by the client certificate of its connection."""

    async def identify(request: Request) -> Caller:
        try:
            return await caller_of(request.client_certificate, verifier)
        except (KmsError, AttestError) as error:
            log_refusal(log, error, verifier.clock, path=request.path)
            raise

    return identify


def tls_context(tls: Tls, deps: KmsDependencies, mandatory: bool = False) -> ssl.SSLContext:
    """Make the TLS settings of `rpc.tls`; `mandatory` demands a client certificate even if they do not.

    The release decides which client certificates are taken: those of the temporary CA, or those of any issuer that
    carry evidence. Raises `KmsConfigError` if the files cannot be loaded.
    """
    if deps.release.any_client_certificate_issuer:
        return _attested_clients_context("rpc.tls", tls.certs, tls.key, deps, mandatory)
    context = _plain_context()
    try:
        context.load_cert_chain(tls.certs, tls.key)
        context.load_verify_locations(tls.mutual.ca_certs)
    except (OSError, ssl.SSLError) as error:
        raise KmsConfigError(
            f"rpc.tls: cannot load {tls.certs}, {tls.key} and {tls.mutual.ca_certs}: {error} "
            "(they are the files in core.cert_dir)"
        ) from error
    context.verify_mode = ssl.CERT_REQUIRED if mandatory or tls.mutual.mandatory else ssl.CERT_OPTIONAL
    return context


def admin_tls_context(tls: AdminTls, deps: KmsDependencies) -> ssl.SSLContext | None:
    """Make the TLS settings of `core.admin.tls`; return None without any.

    A client may show a certificate in releases that give something for it. Raises `KmsConfigError` if the files cannot
    be loaded.
    """
    if tls.files is None:
        return None
    certs, key = tls.files
    if deps.release.admin_get_kms_key:
        return _attested_clients_context("core.admin.tls", certs, key, deps)
    context = _plain_context()
    try:
        context.load_cert_chain(certs, key)
    except (OSError, ssl.SSLError) as error:
        raise _not_loaded("core.admin.tls", certs, key, error) from error
    return context


def _plain_context() -> ServerTlsContext:
    context = ServerTlsContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.num_tickets = 0  # each holds the client's whole certificate, its evidence included
    context.set_alpn_protocols(["http/1.1"])
    return context


def _not_loaded(setting: str, certs: Path, key: Path, error: Exception) -> KmsConfigError:
    return KmsConfigError(f"{setting}: cannot load {certs} and {key}: {error}")


def _attested_clients_context(
    setting: str, certs: Path, key: Path, deps: KmsDependencies, mandatory: bool = False
) -> ssl.SSLContext:
    # Imported only here: it loads a second OpenSSL binding, which a KMS of an earlier release does not need.
    from dstack_emu.transport.ratls_server import attested_clients_context

    def refused(reason: str) -> None:
        deps.log.info("refused", phase="handshake", reason=reason, **early_clock(reason, deps.clock))

    try:
        context = attested_clients_context(certs, key, now=deps.clock, refused=refused, required=mandatory)
    except OSError as error:
        raise _not_loaded(setting, certs, key, error) from error
    context.set_alpn_protocols(["http/1.1"])
    return context
