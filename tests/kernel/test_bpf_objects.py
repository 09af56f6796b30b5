"""kernel/bpf against the running kernel: maps, objects, rejections, links, pins, events."""

import ctypes
import os
import shutil
import struct
import subprocess
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from podwire.errors import KernelError
from podwire.kernel.bpf import (
    AttachType,
    Link,
    Map,
    MapFlag,
    MapType,
    ObjectSpec,
    RingBuffer,
    VerifierRejected,
    features,
    pins,
)

SOURCE = """
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
char _license[] SEC("license") = "Dual BSD/GPL";
const volatile unsigned verdict = 1;
struct { __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, 4096); } events SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_HASH); __type(key, unsigned); __type(value, unsigned);
         __uint(max_entries, 16); } table SEC(".maps");
SEC("tc") int judge(struct __sk_buff *skb) {
    unsigned *e = bpf_ringbuf_reserve(&events, 4, 0);
    if (e) { *e = skb->len; bpf_ringbuf_submit(e, 0); }
    return verdict;
}
SEC("tc") int broken(struct __sk_buff *skb) {
    unsigned key = 0, *value = bpf_map_lookup_elem(&table, &key);
    return *value;
}
"""


@pytest.fixture(scope="module")
def object_file(tmp_path_factory):
    clang = shutil.which("clang-19") or shutil.which("clang-18") or shutil.which("clang")
    if clang is None:
        pytest.skip("no clang")
    folder = tmp_path_factory.mktemp("bpf")
    (folder / "small.bpf.c").write_text(SOURCE)
    include = f"-I/usr/include/{os.uname().machine}-linux-gnu"
    command = [clang, "-O2", "-g", "-target", "bpf", "-mcpu=v3", include]
    subprocess.run(
        [*command, "-c", "small.bpf.c", "-o", "small.bpf.o"], cwd=folder, check=True, timeout=60
    )
    return folder / "small.bpf.o"


def load(path, verdict=1):
    spec = ObjectSpec(path)
    spec.only({"judge"})
    spec.set_constants({"verdict": struct.pack("=I", verdict)})
    return spec.load()


@pytest.fixture
def hash_map():
    made = Map.create(MapType.HASH, 4, 8, 50_000, flags=MapFlag.NO_PREALLOC, name="pwt")
    yield made
    made.close()


def entry(n):
    return struct.pack("=I", n), struct.pack("=Q", n * n)


def test_entries_one_by_one(hash_map):
    key, value = entry(7)
    assert hash_map.lookup(key) is None
    hash_map.update(key, value)
    assert hash_map.lookup(key) == value
    assert hash_map.delete(key)
    assert not hash_map.delete(key)


@pytest.mark.parametrize("kind", [MapType.HASH, MapType.LPM_TRIE])
def test_batches_write_read_and_delete(kind):
    table = Map.create(kind, 8, 8, 50_000, flags=MapFlag.NO_PREALLOC, name="pwt")
    key = (lambda n: struct.pack("=II", 32, n)) if kind == MapType.LPM_TRIE else entry_key
    table.update_batch((key(n), struct.pack("=Q", n)) for n in range(40_000))
    assert dict(table.items()) == {key(n): struct.pack("=Q", n) for n in range(40_000)}
    table.delete_batch(
        [key(n) for n in range(-5, 39_990, 1) if n >= 0] + [key(99_999), key(39_999)]
    )
    assert {k for k, _ in table.items()} == {key(n) for n in range(39_990, 39_999)}
    table.close()


def entry_key(n):
    return struct.pack("=Q", n)


def test_a_full_map_says_so():
    table = Map.create(MapType.HASH, 4, 8, 4, flags=MapFlag.NO_PREALLOC, name="small")
    with pytest.raises(KernelError, match=r"map small is full: it has room for 4 entries"):
        table.update_batch(entry(n) for n in range(10))
    table.close()


def test_constants_test_runs_and_instruction_counts(object_file):
    with load(object_file, verdict=77) as loaded:
        program = loaded.programs["judge"]
        run = program.test_run(bytes(60))
        assert (run.value, run.data) == (77, bytes(60))
        assert program.info.name == "judge"
        assert program.info.verified_instructions > 5


def test_a_rejection_names_program_instruction_and_reason(object_file):
    with pytest.raises(VerifierRejected) as caught:
        ObjectSpec(object_file).load()
    assert caught.value.program == "broken"
    assert "map_value_or_null" in caught.value.reason
    assert "(61) r0 = *(u32 *)(r0 +0)" in caught.value.instruction


def test_events_arrive_in_order_also_around_the_end_of_the_buffer(object_file):
    with load(object_file) as loaded:
        ring = RingBuffer(loaded.maps["events"])
        seen = []
        for n in range(600):
            loaded.programs["judge"].test_run(bytes(60 + n))
            if n % 100 == 99:
                assert ring.wait(1)
                seen += [struct.unpack("=I", record)[0] for record in ring.read()]
        assert seen == [60 + n for n in range(600)]
        ring.close()


def test_a_pinned_link_outlives_its_descriptor_and_is_replaced_in_place(object_file):
    folder = pins.directory(f"pwt-{os.getpid()}-{uuid.uuid4().hex[:6]}")

    def check():
        with load(object_file) as first, load(object_file, verdict=2) as second:
            link = Link.tcx(first.programs["judge"], 1, AttachType.TCX_EGRESS)
            pins.pin(link, folder / "link")
            link.close()
            again = pins.open_link(folder / "link")
            assert again.info.program_id == first.programs["judge"].info.id
            assert again.info.target == 1
            assert again.info.attach_type == AttachType.TCX_EGRESS
            again.update(second.programs["judge"])
            assert again.info.program_id == second.programs["judge"].info.id
            again.close()
            pins.pin(first.maps["table"], folder / "table")
            assert pins.open_map(folder / "table").info.id == first.maps["table"].info.id

    try:
        in_new_namespace(check)
    finally:
        pins.remove(folder)
    assert pins.open_link(folder / "link") is None


def in_new_namespace(function):
    """Run `function` in a thread with a network namespace of its own, which ends with it."""

    def body():
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.unshare(0x40000000) == 0
        function()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(body).result(timeout=30)


def test_probes_answer():
    assert features.has_kfunc("bpf_dynptr_from_skb")
    assert not features.has_kfunc("no_such_function")
    assert isinstance(features.missing(), list)


def test_a_file_that_is_no_object(tmp_path: Path):
    (tmp_path / "x.o").write_text("no")
    with pytest.raises(KernelError, match="cannot open"):
        ObjectSpec(tmp_path / "x.o")
