"""What `services show` says of how external traffic is balanced."""

import pytest

from podwire.datapath.ebpf.balancing import Balancing
from podwire.net import Protocol
from podwire.services import Frontend, FrontendKind, ServicePort, ServicePortName

MAGLEV = Balancing("maglev", 251)


def make_port(kind=FrontendKind.NODE_PORT, backends=2, **fields):
    return ServicePort(
        name=ServicePortName("default", "web", "", Protocol.TCP, 4),
        frontends=(Frontend(kind, b"" if kind == FrontendKind.NODE_PORT else bytes(4), 80),),
        cluster=tuple(bytes([10, 0, 0, n, 0, 80]) for n in range(backends)),
        **fields,
    )


@pytest.mark.parametrize(
    ("balancing", "port", "said"),
    [
        (MAGLEV, make_port(FrontendKind.CLUSTER_IP), ""),
        (MAGLEV, make_port(), "by a Maglev table of 251 entries"),
        (MAGLEV, make_port(algorithm="random"), "at random"),
        (MAGLEV, make_port(backends=252), "at random"),
        (MAGLEV, make_port(backends=1), "to the only backend"),
        (Balancing(), make_port(), "at random"),
        (Balancing(), make_port(algorithm="maglev"), "by a Maglev table of 16381 entries"),
        (
            Balancing(mode="dsr"),
            make_port(),
            "at random, other nodes' backends answer the client directly",
        ),
    ],
)
def test_words(balancing, port, said):
    assert balancing.of(port) == said
