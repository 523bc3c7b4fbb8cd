"""The page a person sees at a fresh KMS: what it measures, and buttons for the calls that set it up.

One HTML file with its script inside (`static/setup.html`): it loads nothing from elsewhere, calls the RPCs that curl
would, and shows a refusal in the KMS's words. Without JavaScript it shows the curl commands.
"""

import base64
import hashlib
import re
from html import escape
from importlib import resources
from typing import Final

_SITE: Final = "<!--site-->"


def setup_page(site_name: str) -> str:
    """Render the page."""
    return _template().replace(_SITE, f" at {escape(site_name)}" if site_name else "")


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
