"""The page a person sees at a fresh KMS: what it measures, and buttons for the calls that set it up.

One HTML file with its script inside (`static/setup.html`): it loads nothing from elsewhere, calls the RPCs that curl
would, and shows a refusal in the KMS's words. A token in the page's own address goes with each call. Without JavaScript
it shows the curl commands.
"""

import base64
import hashlib
import re
from html import escape
from importlib import resources
from typing import Final

_SITE: Final = "<!--site-->"
_SOURCE: Final = "<!--source-->"
_SOURCE_FIELD: Final = (
    "<label>Admin token of the other KMS, if the URL is that of its admin listener "
    '<input name="source_token" type="password" autocomplete="off"></label>'
)


def setup_page(site_name: str, *, takes_source_token: bool = False) -> str:
    """Render the page, with a field for the source's token if this KMS takes one."""
    page = _template().replace(_SITE, f" at {escape(site_name)}" if site_name else "")
    return page.replace(_SOURCE, _SOURCE_FIELD if takes_source_token else "")


def content_security_policy() -> str:
    """Return the header that lets the page run its own script, talk to its own KMS, and nothing else."""
    (script,) = re.findall("<script>(.*)</script>", _template(), re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _template() -> str:
    return resources.files(__package__).joinpath("static/setup.html").read_text()
