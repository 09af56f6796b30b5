"""Test runs of the programs: an IP packet in, an IP packet and a verdict out."""

import struct
import time

from podwire.datapath.ebpf.layout import CONNECTION
from podwire.kernel import netns
from podwire.net import Protocol, parse_mac
from tests.conformance import service_packets as packets
from tests.kernel.ebpf_world import HOST_MAC, MAC, UPLINK_MAC

NEXT, DROP, REDIRECT = 0xFFFFFFFF, 2, 7  # verdicts at tcx
ENDS = {"pod1": (HOST_MAC[1], MAC[1]), "pod2": (HOST_MAC[2], MAC[2]), "up0": UPLINK_MAC}


def make_frame(packet, ends):
    """An IP packet in Ethernet, to the first MAC from the second."""
    kind = 0x0800 if packet[0] >> 4 == 4 else 0x86DD
    return b"".join(map(parse_mac, ends)) + struct.pack(">H", kind) + packet


def run_tcx(space, program, ifindex, frame):
    """``(verdict, IP packet)`` of a frame at an interface of a namespace."""
    context = bytes(40) + struct.pack("=I", ifindex) + bytes(148)  # __sk_buff.ifindex
    done = netns.call(space, lambda: program.test_run(frame, context=context))
    return done.value, done.data[14:]


def run_xdp(space, program, ifindex, frame):
    """``(verdict, frame)`` of a frame at the driver."""
    context = struct.pack("=IIIIII", 0, len(frame), 0, ifindex, 0, 0)  # struct xdp_md
    done = netns.call(space, lambda: program.test_run(frame, context=context))
    return done.value, done.data


def run(world, packet, link="pod1"):
    """``(verdict, IP packet)`` of a packet that comes in from the network by `link`."""
    program = world.programs.program("from_network")
    frame = make_frame(packet, ENDS[link])
    return run_tcx(world.spaces["node"], program, world.ifindex(link), frame)


def crc32c(data):
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = (register >> 1) ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def sctp(source, destination, ports, payload):
    body = struct.pack(">HHI", *ports, 7) + bytes(4) + payload
    body = body[:8] + struct.pack("<I", crc32c(body)) + body[12:]
    return packets._ip(source, destination, Protocol.SCTP, body)


def ones_complement(data):
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def assert_sound(packet):
    """All checksums of an IP packet are right."""
    if packet[0] >> 4 == 4:
        assert ones_complement(packet[:20]) == 0xFFFF
        protocol, body, addresses = packet[9], packet[20:], packet[12:20]
    else:
        protocol, body, addresses = packet[6], packet[40:], packet[8:40]
    if protocol == Protocol.SCTP:
        assert struct.unpack("<I", body[8:12])[0] == crc32c(body[:8] + bytes(4) + body[12:])
        return
    pseudo = (
        b"" if protocol == Protocol.ICMP else addresses + struct.pack(">II", len(body), protocol)
    )
    assert ones_complement(pseudo + body) == 0xFFFF


def write_aged(world, entries, seconds):
    """Entries of the connection table as if all had been seen so long ago."""
    seen_s = (int(time.monotonic()) - seconds) % (1 << 32)
    unpacked = ((key, CONNECTION.unpack(value)) for key, value in entries.items())
    world.programs.growing["connections"].map.update_batch(
        (key, CONNECTION.pack(to, seen_s, *rest)) for key, (to, _, *rest) in unpacked
    )


def grow_older(world, seconds):
    """Let all connections have been silent for so long."""
    write_aged(world, dict(world.programs.growing["connections"].map.items()), seconds)
