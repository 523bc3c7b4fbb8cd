"""Print a software bill of materials (CycloneDX 1.6) of the packages on standard input, one `TYPE NAME VERSION` a line.

TYPE is that of a package URL: `deb` or `pypi`. tools/release.py runs it, with the library of requirements/release.txt.
"""

import sys
from datetime import UTC, datetime
from os import environ
from uuid import NAMESPACE_URL, uuid5

from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

packages = sys.stdin.read()
bill = Bom(serial_number=uuid5(NAMESPACE_URL, packages))
bill.metadata.timestamp = datetime.fromtimestamp(int(environ["SOURCE_DATE_EPOCH"]), UTC)
for line in packages.splitlines():
    kind, name, version = line.split()
    url = PackageURL(type=kind, namespace="debian" if kind == "deb" else None, name=name, version=version)
    bill.components.add(
        Component(type=ComponentType.LIBRARY, name=name, version=version, purl=url, bom_ref=url.to_string())
    )
print(JsonV1Dot6(bill).output_as_string(indent=2))
