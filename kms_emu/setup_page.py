"""The page a person sees at a fresh KMS: what it measures, and the calls that set it up.

Plain HTML over the same RPCs that curl uses; no script, so what it shows is what there is to do.
"""

from html import escape


def setup_page(site_name: str) -> str:
    """Render the page."""
    site = f" at {escape(site_name)}" if site_name else ""
    json_type = "-H 'Content-Type: application/json'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>dstack KMS (EMULATED): set-up</title></head>
<body>
<h1>A fresh dstack KMS{site} (EMULATED: it protects nothing)</h1>
<p>It has no keys yet. Read what it measures, allow that in its auth webhook's policy, then bootstrap it or onboard it
from another KMS, and finish: the same port then answers over TLS.</p>
<ol>
<li><a href="/prpc/Onboard.GetAttestationInfo">What it measures</a></li>
<li>Bootstrap: <code>curl -s -X POST "$KMS/prpc/Onboard.Bootstrap?json" {json_type} -d
'{{"domain":"kms.example.test"}}'</code></li> <li>or onboard: <code>curl -s -X POST "$KMS/prpc/Onboard.Onboard?json"
{json_type} -d '{{"source_url":"https://other-kms:9301/prpc","domain":"kms.example.test"}}'</code></li>
<li>Finish: <code>curl -s "$KMS/finish"</code></li>
</ol>
</body>
</html>
"""
