"""The C structures and numbers of bpf/, as the compiler lays them out, against those in Python."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from podwire.datapath.ebpf import layout
from podwire.nodes import OVERLAY_ID, OVERLAY_PORTS
from podwire.policy import tags

BPF = Path(__file__).parents[2] / "bpf"
CLANG = shutil.which(
    subprocess.run(
        [BPF.parent / "tools/compile", "--clang"], capture_output=True, text=True, timeout=10
    ).stdout.strip()
)

pytestmark = [
    pytest.mark.skipif(CLANG is None, reason="no clang"),
    # Ubuntu's is a script that fails where the running kernel's own package is not installed
    pytest.mark.skipif(
        subprocess.run("bpftool version", shell=True, capture_output=True, timeout=10).returncode,
        reason="no bpftool",
    ),
]

STRUCTS = {
    "frontend_key": layout.FRONTEND_KEY,
    "hit_key": layout.HIT_KEY,
    "frontend": layout.FRONTEND,
    "backend": layout.BACKEND,
    "maglev": layout.MAGLEV,
    "member_key": layout.MEMBER_KEY,
    "range_key": layout.RANGE_KEY,
    "prefix_key": layout.PREFIX_KEY,
    "settings": layout.SETTINGS,
    "flow": layout.FLOW,
    "connection": layout.CONNECTION,
    "interface": layout.INTERFACE,
    "event": layout.EVENT,
    "endpoint": layout.ENDPOINT,
    "rule_key": layout.RULE_KEY,
    "rule": layout.RULE,
    "subject": layout.SUBJECT,
    "tunnel": layout.TUNNEL,
    "collect": layout.COLLECT,
}
ENUMS = {
    "reason": ("REASON_", layout.Reason),
    "frontend_flag": ("FRONTEND_", layout.FrontendFlag),
    "member_list": ("MEMBER_", layout.MemberList),
    "address_flag": ("ADDRESS_", layout.AddressFlag),
    "prefix_flag": ("PREFIX_", layout.PrefixFlag),
    "interface_flag": ("INTERFACE_", layout.InterfaceFlag),
    "endpoint_flag": ("ENDPOINT_", layout.EndpointFlag),
    "network_flag": ("NETWORK_", layout.NetworkFlag),
    "rule_verdict": ("RULE_", layout.RuleVerdict),
    "detect_local": ("DETECT_", layout.DetectBy),
    "phase": ("PHASE_", layout.Phase),
    "connection_flag": ("CONNECTION_", layout.ConnectionFlag),
    "connection_state": ("STATE_", layout.ConnectionState),
    "collect_mode": ("COLLECT_", layout.CollectMode),
}


@pytest.fixture(scope="module")
def types(tmp_path_factory):
    """Types by kind and name: a program holds only those that it uses, so all are used here."""
    source = tmp_path_factory.mktemp("layout") / "all.c"
    kept = [f"struct {name} keep_{name};" for name in STRUCTS]
    kept += [f"enum {name} keep_enum_{name};" for name in ENUMS]
    source.write_text("\n".join(['#include "tcx.bpf.c"', '#include "collect.h"', *kept]))
    include = ["-I", str(BPF), "-I", f"/usr/include/{os.uname().machine}-linux-gnu"]
    compiled = source.with_suffix(".o")
    command = [CLANG, "-O2", "-g", "-target", "bpf", *include, "-c", str(source), "-o"]
    subprocess.run([*command, str(compiled)], check=True, timeout=60)
    command = ["bpftool", "-j", "btf", "dump", "file", str(compiled)]
    text = subprocess.run(command, capture_output=True, timeout=30, check=True).stdout
    by_id = {one["id"]: one for one in json.loads(text)["types"]}
    return {(one["kind"], one["name"]): (one, by_id) for one in by_id.values()}


def leaves(type, by_id, at=0):
    """Where a structure has members, unions by their first member, padding left out."""
    while type["kind"] in ("TYPEDEF", "VOLATILE", "CONST"):
        type = by_id[type["type_id"]]
    if type["kind"] in ("STRUCT", "UNION"):
        members = type["members"][:1] if type["kind"] == "UNION" else type["members"]
        for member in members:
            if not member["name"].startswith("pad"):
                yield from leaves(by_id[member["type_id"]], by_id, at + member["bits_offset"] // 8)
    elif type["kind"] == "ARRAY" and by_id[type["type_id"]]["kind"] == "STRUCT":
        inner = by_id[type["type_id"]]
        for n in range(type["nr_elems"]):
            yield from leaves(inner, by_id, at + n * inner["size"])
    else:
        yield at


@pytest.mark.parametrize("name", list(STRUCTS))
def test_structures_have_the_same_size_and_fields(types, name):
    type, by_id = types["STRUCT", name]
    spelled = STRUCTS[name]
    assert spelled.size == type["size"]
    places = set(leaves(type, by_id))
    for at in range(spelled.size):
        changed = bytearray(spelled.size)
        changed[at] = 1
        visible = any(
            field not in (0, bytes(len(field) if isinstance(field, bytes) else 0))
            for field in spelled.unpack(bytes(changed))
        )
        if at in places:
            assert visible, f"{name}: byte {at} is a field in C and padding in Python"


@pytest.mark.parametrize("name", list(ENUMS))
def test_names_have_the_same_numbers(types, name):
    prefix, spelled = ENUMS[name]
    values = types["ENUM", name][0]["values"]
    in_c = {one["name"].removeprefix(prefix): one["val"] for one in values}
    in_c.pop("MAX", None)
    assert {one.name: one.value for one in spelled} == in_c


def test_what_travels_between_nodes_has_the_same_numbers():
    text = "".join((BPF / name).read_text() for name in ("overlay.h", "packet.h"))
    defined = dict(line.split()[1:3] for line in text.splitlines() if line.startswith("#define"))
    assert (int(defined["TAG_FIRST"]), int(defined["TAG_NONE"])) == (tags.FIRST, OVERLAY_ID)
    ports = {"vxlan": int(defined["VXLAN_PORT"]), "geneve": int(defined["GENEVE_PORT"])}
    assert ports == OVERLAY_PORTS
