"""The grammar of a label, and the errors of what is outside it."""

import pytest

from dstack_emu.gateway.ingress.errors import RefusedConnectionError
from dstack_emu.gateway.ingress.label import Destination, parse_label, parse_port

APP = "3327603e03f5bd1f830812ca4a789277fc31f577"

OF_UPSTREAM = {
    "myapp": Destination("myapp", 80),
    "myapp-8080": Destination("myapp", 8080),
    "myapp-443s": Destination("myapp", 443, is_passthrough=True),
    "myapp-8443s": Destination("myapp", 8443, is_passthrough=True),
    "myapps": Destination("myapps", 80),
    "myapp-s": Destination("myapp", 443, is_passthrough=True),
}
"""What dstack's own tests of `parse_dst_info` expect."""

OF_THE_GRAMMAR = {
    "myapp-": Destination("myapp", 80),
    "myapp-g": Destination("myapp", 80, is_h2=True),
    "myapp-50051g": Destination("myapp", 50051, is_h2=True),
    "myapp-0": Destination("myapp", 0),
    "myapp-00080": Destination("myapp", 80),
    "myapp-+80": Destination("myapp", 80),
    "myapp-65535": Destination("myapp", 65535),
    f"{APP}-65535s": Destination(APP, 65535, is_passthrough=True),
}

REFUSED = {
    "": "app id is empty",
    "-8080": "app id is empty",
    "myapp-sg": "invalid sni format: `gs` is not allowed",
    "myapp-443sg": "invalid sni format: `gs` is not allowed",
    "myapp-gs": "invalid port: 'g'",
    "myapp-443gs": "invalid port: '443g'",
    "myapp-65536": "invalid port: '65536'",
    "myapp-x": "invalid port: 'x'",
    "myapp-8o80": "invalid port: '8o80'",
    "myapp-٣": "invalid port: '٣'",
    "myapp-80-": "invalid sni format",
    "myapp-80-81": "invalid sni format",
    "myapp--80": "invalid sni format",
    "myapp-" + "9" * 60: f"invalid port: '{'9' * 60}'",
}


@pytest.mark.parametrize(("label", "destination"), [*OF_UPSTREAM.items(), *OF_THE_GRAMMAR.items()])
def test_label_means_an_id_a_port_and_a_treatment(label: str, destination: Destination) -> None:
    assert parse_label(label) == destination


@pytest.mark.parametrize(("label", "why"), REFUSED.items())
def test_label_outside_the_grammar_is_refused(label: str, why: str) -> None:
    with pytest.raises(RefusedConnectionError) as refused:
        parse_label(label)
    assert str(refused.value) == why


def test_longest_label_fits_into_a_domain_name() -> None:
    assert len(f"{APP}-65535s") <= 63


@pytest.mark.parametrize("text", ["", "-1", " 80", "1e3", "0" * 1000])
def test_port_is_a_decimal_number_of_16_bits(text: str) -> None:
    assert parse_port(text) is None
