"""Everything podwire asks of bpf(2): objects, maps, programs, links, pins, events, probes.

In: compiled objects (`.o`) and packed bytes. Out: file descriptors with verbs. An `ObjectSpec` is
what a file says; a `LoadedObject` is what the kernel holds. libbpf reads ELF, relocates and creates
maps; all else is bpf(2) itself, because Debian 12's libbpf is older than tcx and netfilter links.
"""

from podwire.kernel.bpf.links import AttachType, Link
from podwire.kernel.bpf.maps import Map, MapFlag, MapType
from podwire.kernel.bpf.objects import LoadedObject, ObjectSpec, VerifierRejected
from podwire.kernel.bpf.programs import Program, TestRun
from podwire.kernel.bpf.ringbuf import RingBuffer

__all__ = [
    "AttachType",
    "Link",
    "LoadedObject",
    "Map",
    "MapFlag",
    "MapType",
    "ObjectSpec",
    "Program",
    "RingBuffer",
    "TestRun",
    "VerifierRejected",
]
