"""Write podwire/ipam/vpc/instance_types.txt from a dump of EC2's DescribeInstanceTypes.

    python tools/instance_types.py [DUMP.json[.gz]] > podwire/ipam/vpc/instance_types.txt

Without an argument it reads the dump that moto (a test dependency) ships. Types that are missing
from the file are looked up in EC2 when the agent starts, so it need not be fresh.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

HEADER = """\
# EC2 instance types by their network limits, as DescribeInstanceTypes gives them.
# ENIs of the default network card, IPv4 and IPv6 addresses per ENI, cards, hypervisor: types
"""


def main(arguments: list[str]) -> None:
    path = Path(arguments[0]) if arguments else _motos_dump()
    raw = path.read_bytes()
    types: dict[str, dict[str, Any]] = json.loads(
        gzip.decompress(raw) if path.suffix == ".gz" else raw
    )
    groups: dict[tuple[int, int, int, int, str], list[str]] = defaultdict(list)
    for name, facts in types.items():
        network = facts["NetworkInfo"]
        default = network.get("DefaultNetworkCardIndex", 0)
        cards = {card["NetworkCardIndex"]: card for card in network["NetworkCards"]}
        hypervisor = "metal" if facts.get("BareMetal") else facts.get("Hypervisor", "nitro")
        groups[
            cards[default]["MaximumNetworkInterfaces"],
            network["Ipv4AddressesPerInterface"],
            network["Ipv6AddressesPerInterface"],
            network["MaximumNetworkCards"],
            hypervisor,
        ].append(name)
    sys.stdout.write(HEADER)
    for limits, names in sorted(groups.items()):
        print(*limits, sep=" ", end=":")
        print("", *sorted(names))


def _motos_dump() -> Path:
    spec = importlib.util.find_spec("moto")
    assert spec is not None
    assert spec.origin is not None, "moto is not installed"
    return Path(spec.origin).parent / "ec2/resources/instance_types.json.gz"


if __name__ == "__main__":
    main(sys.argv[1:])
