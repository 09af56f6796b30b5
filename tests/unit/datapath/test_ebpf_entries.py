"""The kernel's connection entries as ours, and back: which packets become what."""

from podwire.datapath.ebpf import entries
from podwire.datapath.ebpf.entries import Node
from podwire.datapath.ebpf.layout import CONNECTION, FRONTEND_KEY, ConnectionFlag, mapped
from podwire.kernel.ctnetlink import Entry, Status, TcpState, Tuple
from podwire.net import Protocol, parse_address

CLIENT, SERVER, NODE, WORLD, VIP = (
    parse_address(text)
    for text in ("10.244.0.2", "10.244.1.5", "192.168.9.10", "203.0.113.1", "10.96.0.1")
)
WEB = FRONTEND_KEY.pack(mapped(VIP), (80).to_bytes(2, "big"), Protocol.TCP)
HERE = Node(frozenset([NODE]), frozenset([CLIENT]), {WEB: 7})


def tcp(original, reply, state=TcpState.ESTABLISHED):
    """An entry, its directions written as (source, port, destination, port)."""
    made = [Tuple(s, d, Protocol.TCP, sp, dp) for s, sp, d, dp in (original, reply)]
    return Entry(*made, Status.SEEN_REPLY, state=state)


def rewrites(entry, node=HERE):
    """``{what packets look like: (what they become, flags)}``, directions as in `tcp`."""
    out = {}
    for key, value in entries.pairs(entry, node, 100):
        to, *_, flags = CONNECTION.unpack(value)
        (one, _), (other, _) = (next(entries.kernel_entries(_plain(flow))) for flow in (key, to))
        out[_direction(one.original)] = (
            _direction(other.original),
            ConnectionFlag(flags) & ~ConnectionFlag.COPIED,
        )
    return out


def _plain(flow):
    back = entries.reversed_flow(flow)
    reply = CONNECTION.pack(back, 0, 0, 0, ConnectionFlag.REPLY)
    return {flow: CONNECTION.pack(flow, 0, 0, 0, 0), back: reply}


def _direction(of):
    return (of.source, of.source_port, of.destination, of.destination_port)


def test_a_connection_to_a_service_is_rewritten_in_both_directions():
    entry = tcp((CLIENT, 4000, VIP, 80), (SERVER, 8080, CLIENT, 4000))
    assert rewrites(entry) == {
        (CLIENT, 4000, VIP, 80): ((CLIENT, 4000, SERVER, 8080), ConnectionFlag.TRANSLATED),
        (SERVER, 8080, CLIENT, 4000): (
            (VIP, 80, CLIENT, 4000),
            ConnectionFlag.TRANSLATED | ConnectionFlag.REPLY,
        ),
    }
    values = [CONNECTION.unpack(value) for _, value in entries.pairs(entry, HERE, 100)]
    assert {(seen, service) for _, seen, service, _, _ in values} == {(100, 7)}


def test_a_masqueraded_one_keeps_its_port():
    entry = tcp((CLIENT, 4000, WORLD, 443), (WORLD, 443, NODE, 61234))
    assert rewrites(entry) == {
        (CLIENT, 4000, WORLD, 443): ((NODE, 61234, WORLD, 443), ConnectionFlag.TRANSLATED),
        (WORLD, 443, NODE, 61234): (
            (WORLD, 443, CLIENT, 4000),
            ConnectionFlag.TRANSLATED | ConnectionFlag.REPLY,
        ),
    }
    assert entries.is_carried(entry, HERE.own)


def test_what_the_nodes_own_processes_have_under_way_stays_with_netfilter():
    asks = tcp((NODE, 4000, VIP, 80), (SERVER, 8080, NODE, 4000))
    serves = tcp((CLIENT, 4000, VIP, 443), (NODE, 6443, CLIENT, 4000))
    back = ConnectionFlag.STACK | ConnectionFlag.REPLY
    assert rewrites(asks) == {
        (NODE, 4000, SERVER, 8080): ((NODE, 4000, SERVER, 8080), ConnectionFlag.STACK),
        (SERVER, 8080, NODE, 4000): ((SERVER, 8080, NODE, 4000), back),
    }
    assert rewrites(serves) == {
        (CLIENT, 4000, VIP, 443): ((CLIENT, 4000, VIP, 443), ConnectionFlag.STACK),
        (VIP, 443, CLIENT, 4000): ((VIP, 443, CLIENT, 4000), back),
    }
    assert not entries.is_carried(asks, HERE.own)
    assert not entries.is_carried(serves, HERE.own)


def test_plain_connections_of_pods_are_known_so_that_no_policy_judges_their_answers():
    plain = tcp((CLIENT, 4000, SERVER, 80), (SERVER, 80, CLIENT, 4000))
    probe = tcp((NODE, 4000, CLIENT, 80), (CLIENT, 80, NODE, 4000))
    for entry in (plain, probe):
        assert [flags for _, flags in rewrites(entry).values()] == [ConnectionFlag.REPLY, 0]
    assert rewrites(tcp((NODE, 4000, WORLD, 443), (WORLD, 443, NODE, 4000))) == {}


def test_the_way_back_names_the_same_connection():
    for entry in (
        tcp((CLIENT, 4000, VIP, 80), (SERVER, 8080, CLIENT, 4000)),
        tcp((CLIENT, 4000, WORLD, 443), (WORLD, 443, NODE, 61234)),
    ):
        ((back, _),) = entries.kernel_entries(dict(entries.pairs(entry, HERE, 100)))
        assert (back.original, back.reply, back.state) == (*entry[:2], TcpState.ESTABLISHED)
        assert back.status & Status.SEEN_REPLY


def test_what_a_socket_told_of_one_end_is_no_connection_of_its_own():
    held = dict(entries.pairs(tcp((CLIENT, 9, VIP, 80), (SERVER, 8080, CLIENT, 9)), HERE, 0))
    seen = tcp((CLIENT, 9, SERVER, 8080), (SERVER, 8080, CLIENT, 9))
    held = dict(entries.pairs(seen, HERE, 0)) | held
    ((found, _),) = entries.kernel_entries(held)
    assert found.original.destination == VIP


def test_echo_requests_and_other_zones_are_left_out():
    ping = Tuple(CLIENT, WORLD, Protocol.ICMP, 5, 8 << 8)
    assert entries.pairs(Entry(ping, Tuple(WORLD, NODE, Protocol.ICMP, 5, 0)), HERE, 0) == []
    elsewhere = tcp((CLIENT, 1, VIP, 80), (SERVER, 8080, CLIENT, 1))._replace(zone=3)
    assert entries.pairs(elsewhere, HERE, 0) == []


def test_an_association_of_sctp_comes_as_an_open_one():
    there, back = ((CLIENT, 1, VIP, 80), (SERVER, 80, CLIENT, 1))
    made = [Tuple(s, d, Protocol.SCTP, sp, dp) for s, sp, d, dp in (there, back)]
    states = [
        [CONNECTION.unpack(value)[3] for _, value in entries.pairs(Entry(*made, status), HERE, 0)]
        for status in (Status.SEEN_REPLY, Status(0))
    ]
    assert states == [[3, 3], [0, 1]]
