"""The admin listener: ClearImageCache and, by release, GetKmsKey for operators, who need a credential.

It has an address of its own, as in next. GetKmsKey also demands an attested client certificate, so it needs TLS
(`core.admin.tls`); without TLS the listener is plain HTTP, and refuses every call of GetKmsKey. Source: dstack
`kms/src/{admin_auth,admin_service,main_service}.rs` at 312dc605, and the acceptance tests of 0.6.0.
"""

from dstack_emu.kms_emu.call_log import journaled
from dstack_emu.kms_emu.dependencies import KmsDependencies
from dstack_emu.kms_emu.errors import KmsError
from dstack_emu.kms_emu.image_cache import ImageCache, admin_listener_rpc
from dstack_emu.kms_emu.runtime_phase import caller
from dstack_emu.kms_emu.service import Caller, KmsService, admin_handover_rpc
from dstack_emu.transport.api_auth import ListenerAuth
from dstack_emu.transport.http import ROCKET_HEADERS, Application
from dstack_emu.transport.prpc_server import RpcStatuses, add_prpc
from dstack_emu.transport.service import ServiceTable


def admin_app(service: KmsService, deps: KmsDependencies, auth: ListenerAuth) -> Application:
    """Make the listener's application."""
    app = Application(headers=ROCKET_HEADERS, middlewares=[auth.middleware(deps.log)])
    who, statuses = caller(deps.verifier, deps.log), RpcStatuses.of(deps.release)
    add_prpc(app, "/prpc", admin_table(service), who, errors=(KmsError,), statuses=statuses)
    return app


def admin_table(service: KmsService) -> ServiceTable[Caller]:
    """Return the RPCs of the admin listener."""
    rpcs = [admin_listener_rpc(ImageCache(service.core.image.cache_dir))]
    if service.release.admin_get_kms_key:
        rpcs.append(admin_handover_rpc(service))
    return journaled(ServiceTable.of("Admin.", *rpcs), service.log, service.clock, Caller.fields)
