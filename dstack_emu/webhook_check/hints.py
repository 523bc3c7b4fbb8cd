"""Hints about answers that a KMS does not understand, found by the text of its error."""

import re
from typing import Final

_HINTS: Final = (
    (r"returned 3\d\d", "answer at the URL that the KMS is given: it does not follow redirects"),
    (r"returned 40[45]", "serve GET / and POST /bootAuth/kms and /bootAuth/app, each below the URL, without a slash"),
    (
        r"returned 40[13]",
        "a KMS sends no credentials, and an error status is not a denial: to deny, answer 200 with isAllowed false",
    ),
    (
        r"returned (400|415|422)",
        "accept the request as it is: application/json, camelCase, hex without 0x, fields that are new or empty",
    ),
    (r"returned 429", "do not limit the rate of requests: a KMS sends one for every key"),
    (r"returned 5\d\d", "use an error status for a failure behind the webhook, not for a denial"),
    (r"returned \d", "answer with status 200, also for a denial"),
    (r"missing field `(isAllowed|reason|gatewayAppId)`", "all three fields are needed, also for a denial"),
    (
        r"missing field `",
        "GET / needs status, kmsContractAddr, gatewayAppId, chainId and appImplementation",
    ),
    (r"expected a boolean", "isAllowed is true or false, not a text or a number"),
    (r"expected a string", "use a text, empty if there is nothing to say, not null or a number"),
    (r"expected u64", "chainId is a whole number from 0 to 2^64-1, not a text or a fraction"),
    (r"duplicate field", "write each field once"),
    (r"expected struct", "answer with one JSON object"),
    (r"failed to decode", "answer with JSON in UTF-8, and nothing else"),
    (r"no answer within", "answer sooner, or deny: whatever the webhook waits for needs a time limit of its own"),
    (r"answered more than", "keep the answer short: only three fields are read"),
    (r"connection closed within", "send the whole body, and the right Content-Length"),
    (r"connection closed before|Connection reset", "answer every request, also further ones over the same connection"),
    (
        r"Connection refused|no such host|No route|unreachable",
        "check that the webhook runs, and that the address is right",
    ),
    (r"TLS: ", "use a certificate that this machine trusts, for the name in the URL"),
)


def hint_for(text: str) -> str:
    """Return the advice for an error; empty if there is none."""
    return next((hint for pattern, hint in _HINTS if re.search(pattern, text)), "")
