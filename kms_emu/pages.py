"""The pages of a KMS: how to set up a fresh one, and what one with keys is.

The set-up page (`static/setup.html`) shows what the KMS measures, and has buttons for the calls that set it up. Its
script is in the page: it loads nothing from elsewhere, calls the RPCs that curl would, and shows a refusal in the KMS's
words. A token in the page's own address goes with each call. Without JavaScript it shows the curl commands. The page of
a KMS with keys (`static/runtime.html`) has no script.
"""

import re
from html import escape
from importlib import resources
from typing import Final

from dstack_emu.transport.html import content_security_policy, header, style_element

_SITE: Final = "<!--site-->"
_SOURCE: Final = "<!--source-->"
_SOURCE_FIELD: Final = (
    "<label>Admin token of the other KMS, if the URL is that of its admin listener "
    '<input name="source_token" type="password" autocomplete="off"></label>'
)


def setup_page(site_name: str, *, takes_source_token: bool = False) -> str:
    """Render the page, with a field for the source's token if this KMS takes one."""
    page = _template("setup").replace(_SITE, _at(site_name))
    return page.replace(_SOURCE, _SOURCE_FIELD if takes_source_token else "")


def setup_policy() -> str:
    """Return the header that lets the set-up page run its own script, call its own KMS, and do nothing else."""
    (script,) = re.findall("<script>(.*)</script>", _template("setup"), re.DOTALL)
    return content_security_policy(script)


def runtime_page(site_name: str, *, version: str, origin: str) -> str:
    """Render the page of a KMS with keys; `origin` is the `https://host:port` by which the browser reached it."""
    values = {_SITE: _at(site_name), "<!--version-->": escape(version), "<!--origin-->": escape(origin)}
    page = _template("runtime")
    for place, value in values.items():
        page = page.replace(place, value)
    return page


def _at(site_name: str) -> str:
    return f" at {escape(site_name)}" if site_name else ""


def _template(name: str) -> str:
    text = resources.files(__package__).joinpath(f"static/{name}.html").read_text()
    return text.replace("<!--style-->", style_element()).replace("<!--header-->", header("dstack KMS"))
