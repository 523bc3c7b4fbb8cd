"""The webhooks and KMS of a user's own in a stack: what their settings may be, and what such a webhook has to allow."""

from collections.abc import Iterable, Mapping
from math import isfinite
from pathlib import Path
from urllib.parse import urlsplit

from dstack_emu.deployment.config import StackConfig
from dstack_emu.deployment.errors import StackError
from dstack_emu.deployment.foreign_kms import EXTERNAL, is_url
from dstack_emu.deployment.kms_process import command_words
from dstack_emu.deployment.running_kms import PERMANENT, RunningKms
from dstack_emu.observability.journal import Journal
from dstack_emu.simulator.agent import GuestAgent
from dstack_emu.transport.urls import is_http_url, shown_url

REQUEST_MEMBERS = ("mr_aggregated", "os_image_hash", "device_id", "app_id", "compose_hash")


def require_foreign_parts(config: StackConfig) -> None:
    """Verify the settings `webhooks`, `kms` and `kms_wait`; raise `StackError`, which says what is wrong."""
    for setting, given in (("webhook", config.webhooks), ("kms", config.kms)):
        for name in given:
            if name not in PERMANENT:
                raise StackError(f"{setting}: {' or '.join(PERMANENT)} expected, got {name!r:.60}")
    for name, url in config.webhooks.items():
        if not is_http_url(url):
            raise StackError(f"webhook of {name}: http(s)://host:port expected, got {shown_url(url)!r:.200}")
    for name, program in config.kms.items():
        if is_url(program):
            if not is_http_url(program) or urlsplit(program).path not in ("", "/"):
                raise StackError(f"kms {name}: http(s)://host:port expected, got {shown_url(program)!r:.200}")
        elif program != EXTERNAL:
            command_words(program, Path("kms.toml"))
    if config.kms_wait is not None and not (isfinite(config.kms_wait) and config.kms_wait > 0):
        raise StackError(f"kms_wait: a number of seconds above 0 expected, got {config.kms_wait!r:.40}")


def foreign_webhooks(kms: Iterable[RunningKms]) -> dict[str, str]:
    """Return the URL of each webhook that is not the stack's, without credentials, by the name of its KMS."""
    return {each.name: shown_url(each.spec.webhook) for each in kms if each.spec.asks_foreign_webhook}


def what_to_allow(kms: Mapping[str, RunningKms], app: GuestAgent) -> str:
    """Say which webhooks of the user's own are asked, and what they have to allow, on several lines.

    It is empty if there is none.
    """
    urls = foreign_webhooks(kms.values())
    return "\n  ".join([_whose_policy(urls), *_whom_to_allow(kms, app)]) if urls else ""


def _whose_policy(urls: Mapping[str, str]) -> str:
    asked = ", ".join(f"kms-{name} asks {url}" for name, url in urls.items())
    return f"{asked}, whose policy is yours. All of these must be allowed:"


def _whom_to_allow(kms: Mapping[str, RunningKms], app: GuestAgent) -> list[str]:
    agents = {each.spec.service: each.guest.agent for each in kms.values()} | {"the app": app}
    return [f"{name}: {_identity(_members_of(agent))}" for name, agent in agents.items()]


def what_was_denied(journal: Journal, kms: Mapping[str, RunningKms], app: GuestAgent) -> str:
    """Say what a webhook of the user's own was asked and denied last; empty if there is no such webhook.

    A question of a KMS that is another program is not known; then everything that the webhook has to allow is named.
    """
    urls = foreign_webhooks(kms.values())
    if not urls:
        return ""
    for record in reversed(journal.find(service="webhook", outcome="denied")):
        url = urls.get(record["caller"].removeprefix("kms-"))
        if url is not None:
            identity = _identity(record["decision"]["asked"])
            asked = f"{record['caller']} asked your webhook {url.rstrip('/')}{record['call']} about {identity}"
            return f". {asked}. Allow that there, or use --fresh, which asks no webhook by itself"
    allowed = "; ".join(_whom_to_allow(kms, app))  # an error is one line
    return f". {_whose_policy(urls)} {allowed}. Or use --fresh, which asks no webhook by itself"


def _members_of(agent: GuestAgent) -> dict[str, str]:
    info = agent.app_info()
    return {name: getattr(info, name).hex() for name in REQUEST_MEMBERS}


def _identity(members: Mapping[str, str]) -> str:
    """Return the members of a webhook's request that tell one trust domain from another, as the request has them."""
    return ", ".join(f"{_camel_case(name)} {members[name]}" for name in REQUEST_MEMBERS)


def _camel_case(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(other.capitalize() for other in others)
