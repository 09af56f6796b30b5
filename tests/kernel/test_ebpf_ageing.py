"""How long a silent connection is remembered, by what its two ends have sent."""

import struct

import pytest

from podwire.datapath.ebpf.programs import Programs
from podwire.datapath.ebpf.services import ServicesPart
from podwire.net import Protocol
from tests.conformance import service_packets as packets
from tests.kernel.ebpf_runs import NEXT, grow_older, run, write_aged
from tests.kernel.ebpf_runs import sctp as sctp_packet
from tests.kernel.ebpf_services import VIP, make_port, make_table
from tests.kernel.ebpf_world import NEEDS_EBPF, POD, REMOTE, World

pytestmark = NEEDS_EBPF

CLIENT, SERVER, SERVICE = POD[1][4], POD[2][4], VIP[4]
FIN, SYN, RST, ACK = 1, 2, 4, 16
INIT, INIT_ACK, SACK, ABORT, SHUTDOWN, SHUTDOWN_ACK = 1, 2, 3, 6, 7, 8
COOKIE_ECHO, COOKIE_ACK, SHUTDOWN_COMPLETE = 10, 11, 14
DAY = 86400

OPENED = [("client", SYN), ("server", SYN | ACK), ("client", ACK)]
TCP = {
    "a SYN": (OPENED[:1], 60),
    "a SYN that was answered": (OPENED[:2], 60),
    "an open connection": (OPENED, DAY),
    "the client has closed": ([*OPENED, ("client", FIN | ACK)], 3600),
    "the server has closed": ([*OPENED, ("server", FIN | ACK)], 3600),
    "both have closed": ([*OPENED, ("client", FIN | ACK), ("server", FIN | ACK)], 30),
    "the client has reset it": ([*OPENED, ("client", RST)], 10),
    "the server has reset it": ([*OPENED, ("server", RST | ACK)], 10),
    "refused": ([OPENED[0], ("server", RST | ACK)], 10),
    "reset, says who was believed neither here nor there": (
        [*OPENED, ("server", RST), ("client", ACK), ("server", ACK)],
        DAY,
    ),
}
ASSOCIATED = [
    ("client", INIT),
    ("server", INIT_ACK),
    ("client", COOKIE_ECHO),
    ("server", COOKIE_ACK),
]
SCTP = {
    "an INIT": (ASSOCIATED[:1], 30),
    "an INIT that was answered": (ASSOCIATED[:2], 30),
    "an open association": (ASSOCIATED, 210),
    "data under way": ([*ASSOCIATED, ("client", 0), ("server", SACK)], 210),
    "aborted": ([*ASSOCIATED, ("server", ABORT)], 10),
    "shutting down": ([*ASSOCIATED, ("client", SHUTDOWN), ("server", SHUTDOWN_ACK)], 10),
    "shut down": (
        [
            *ASSOCIATED,
            *(("client", SHUTDOWN), ("server", SHUTDOWN_ACK), ("client", SHUTDOWN_COMPLETE)),
        ],
        10,
    ),
}


@pytest.fixture(scope="module")
def world():
    with World() as made:
        made.programs = Programs(made.name, made.spaces["node"], connections=256)
        part = ServicesPart(programs=made.programs)
        part.start()
        ports = [
            make_port("web", 80, [SERVER], family=4, protocol=protocol)
            for protocol in (Protocol.TCP, Protocol.SCTP)
        ]
        made.serve_from = lambda *backends: part.apply(
            make_table([*ports, make_port("moving", 90, backends, family=4, protocol=Protocol.TCP)])
        )
        made.serve_from()
        yield made
        made.programs.close()


@pytest.fixture(autouse=True)
def fresh(world):
    world.programs.connections.clear()


def tcp(source, destination, ports, flags):
    return packets.tcp(source, destination, ports, flags, 1, 1, b"PW000001")


def sctp(source, destination, ports, chunk):
    return sctp_packet(source, destination, ports, struct.pack(">BBH", chunk, 0, 4))


def send(world, make, side, what):
    if side == "client":
        assert run(world, make(CLIENT, SERVICE, (5000, 80), what))[0] == NEXT
    else:
        run(world, make(SERVER, CLIENT, (80, 5000), what), "pod2")


def lifetime(world, longest=2 * DAY):
    """Seconds of silence that the connection survives, ± 3."""
    table = world.programs.growing["connections"].map
    held = dict(table.items())
    assert len(held) == 2
    alive, dead = 0, longest
    while dead - alive > 2:
        middle = (alive + dead) // 2
        write_aged(world, held, middle)
        world.programs.connections.expire()
        gone = not list(table.items())
        alive, dead = (alive, middle) if gone else (middle, dead)
    write_aged(world, held, 0)
    return dead


@pytest.mark.parametrize(("sent", "lives"), TCP.values(), ids=TCP)
def test_tcp(world, sent, lives):
    for side, flags in sent:
        send(world, tcp, side, flags)
    assert abs(lifetime(world) - lives) <= 3


@pytest.mark.parametrize(("sent", "lives"), SCTP.values(), ids=SCTP)
def test_sctp(world, sent, lives):
    for side, chunk in sent:
        send(world, sctp, side, chunk)
    assert abs(lifetime(world) - lives) <= 3


@pytest.mark.parametrize("end", [ABORT, SHUTDOWN_COMPLETE])
def test_an_association_that_has_ended_gives_way_to_a_new_one_from_the_same_port(world, end):
    for side, chunk in [*ASSOCIATED, ("client", end), ("client", INIT)]:
        send(world, sctp, side, chunk)
    assert abs(lifetime(world) - 30) <= 3


def test_a_packet_without_a_chunk_is_none_of_sctp(world):
    before = world.programs.outcomes()["broken"]
    run(world, sctp_packet(CLIENT, SERVICE, (5000, 80), b""))
    assert world.programs.outcomes()["broken"] == before + 1


def test_a_client_that_begins_again_is_not_left_with_a_backend_that_is_gone(world):
    """The first SYN still goes where the open connection did, for the backend may be there."""
    world.serve_from(SERVER)
    for side, flags in OPENED:
        if side == "client":
            run(world, tcp(CLIENT, SERVICE, (5000, 90), flags))
        else:
            send(world, tcp, side, flags)
    world.serve_from(REMOTE[4])
    syn = tcp(CLIENT, SERVICE, (5000, 90), SYN)
    grow_older(world, 600)
    assert packets.parse(run(world, syn)[1]).destination == SERVER
    assert abs(lifetime(world) - DAY) <= 3
    grow_older(world, 1)
    assert packets.parse(run(world, syn)[1]).destination == REMOTE[4]
    assert abs(lifetime(world) - 60) <= 3


def test_a_syn_that_is_answered_changes_nothing(world):
    for side, flags in [*OPENED, ("client", SYN), ("server", ACK), ("client", ACK)]:
        send(world, tcp, side, flags)
    grow_older(world, 1)
    send(world, tcp, "client", SYN)
    assert abs(lifetime(world) - DAY) <= 3
