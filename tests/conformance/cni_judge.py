"""Judges a run: what the last call answered, and the state of the node and its pods."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.conformance import cni_effects as effects
from tests.conformance import cni_expect
from tests.conformance.cni_case import fill, name_of
from tests.conformance.cni_live import Live
from tests.conformance.cni_probes import probe
from tests.conformance.cni_state import state

if TYPE_CHECKING:
    from tests.conformance.cni_run import Run

SETTLE_S = 3.0


def judge(run: Run, expect: dict[str, Any]) -> list[str]:
    """Differences that remain; removals may take a moment."""
    removed = run.environment.get("CNI_COMMAND") in ("DEL", "GC") or run.restarted
    deadline = time.monotonic() + (SETTLE_S if removed else 0)
    while True:
        problems = list(_differences(run, expect))
        if not problems or time.monotonic() >= deadline:
            return problems
        time.sleep(0.1)


def _differences(run: Run, raw: dict[str, Any]) -> Iterator[str]:
    expect = fill(raw, run.all_values())
    if run.last:
        previous = run.config.get("prevResult")
        yield from cni_expect.output(expect, run.last, previous, run.results)
    try:
        yield from state(expect, run.lives())
    except ValueError as error:
        yield str(error)
    yield from _rules(run, expect.get("rules"))
    for each in expect.get("probes", []):
        yield from probe(run, each)
    for what, where in expect.get("same", {}).items():
        saved = run.saved.get((what, where["ns"], where["link"]))
        if saved is None or run.property_of(what, where) != saved:
            yield f"the {what} of {where['link']} is not {saved}, which was saved"
    if expect.get("no_residue"):
        yield from _residue(run)
    yield from _files(expect.get("files"))
    yield from _leases(run, expect)
    yield from _conntrack(run, expect.get("conntrack"))
    if "latency" in expect:
        empty = float(run.values.get("EMPTY_MEDIAN", "inf"))
        # what else the machine does comes and goes; what a full store costs stays
        full = min(run.latency(20) for _ in range(5))
        if full > 2 * empty:
            yield f"ADD takes {full * 1e3:.1f} ms, {empty * 1e3:.1f} ms with an empty store"


def _leases(run: Run, expect: dict[str, Any]) -> Iterator[str]:
    found = sorted(f"{key.container}/{key.ifname}" for key in run.attachments())
    wanted = expect.get("leases")
    if isinstance(wanted, list) and found != sorted(wanted):
        yield f"leases are {found}, not {wanted}"
    count = wanted.get("length") if isinstance(wanted, dict) else wanted
    if isinstance(count, int) and len(found) != count:
        yield f"{len(found)} leases, not {count}: {found}"
    for key, given in (("distinct_addresses", run.addresses), ("distinct_leases", found)):
        if not expect.get(key):
            continue
        if len(set(given)) != len(given):
            yield f"{key}: something was given twice: {sorted(given)}"
        if expect[key] is not True and len(given) != expect[key]:
            yield f"{key}: {len(given)}, not {expect[key]}"


def _files(files: dict[str, Any] | None) -> Iterator[str]:
    """Literally; the reference's own lease files are left out."""
    if not files or files.get("reference_only"):
        return
    for path in files.get("present", []):
        if not Path(path).exists():
            yield f"there is no file {path}"
    for path in files.get("absent", []):
        if Path(path).exists():
            yield f"there is a file {path}"
    for path, content in files.get("content", {}).items():
        if not Path(path).exists() or Path(path).read_text() != content:
            yield f"{path} does not hold {content!r}"
    if "no_addresses_in" in files:
        folder = Path(files["no_addresses_in"])
        names = [each.name for each in folder.glob("*")]
        left = [n for n in names if n != "lock" and not n.startswith("last_reserved_ip")]
        if left:
            yield f"{folder} holds {left}"


def _rules(run: Run, rules: dict[str, Any] | None) -> Iterator[str]:
    """By effect: tables, chains and comments are the reference's."""
    if not rules:
        return
    present = any("contains" in each for each in rules.values())
    ips, config = run.pod_ips(), run.config
    if not present:
        yield from effects.mentions(Live(run.host), ips, living=bool(run.attachments()))
    plain = [ip for ip in ips if run.pod_has(ip)]
    if "portMappings" in config.get("runtimeConfig", {}):
        yield from effects.host_ports(config, present, run.host, run.pod, run.outside(), plain)
    if config.get("ipMasq") and present:
        yield from effects.masquerade(run.pod, run.outside(), plain, True)
    if config.get("macspoofchk") and present:
        bridge = config.get("bridge", "cni0")
        ifname = run.environment["CNI_IFNAME"]
        if effects.spoofed_frame_passes(run.host, run.pod, ifname, bridge):
            yield "a frame with another source MAC leaves the pod"
    if name_of(run.case.plugin) == "podwire-firewall":
        for ip in plain:
            yield from effects.forwarding(run.host, run.pod, run.outside(), ip, present)


def _residue(run: Run) -> Iterator[str]:
    extra = run.host_links() - run.host_links_before
    if extra:
        yield f"links are left: {sorted(extra)}"
    container = run.environment.get("CNI_CONTAINERID")
    if any(key.container == container for key in run.attachments()):
        yield f"a lease of {container} is left"
    yield from effects.mentions(Live(run.host), run.pod_ips(), living=bool(run.attachments()))


def _conntrack(run: Run, wanted: Any) -> Iterator[str]:
    """Entries of the host: `contains`/`present` and `lacks`/`absent`, each a list of texts or of
    objects (`protocol`, `src`, `dst`, `sport`, `dport`); prose that names ports says "none".
    """
    if wanted is None:
        return
    if isinstance(wanted, str):
        wanted = {"absent": [{"dport": port} for port in re.findall(r"\b\d{2,5}\b", wanted)]}
        if not wanted["absent"]:
            yield "the runner does not know what conntrack expects"
    if isinstance(wanted, list):
        wanted = {"absent": wanted}
    listed = "".join(
        run.host.run("conntrack", "-f", family, "-L") for family in ("ipv4", "ipv6")
    ).splitlines()
    for key, entries in wanted.items():
        word = key.removeprefix("host_")
        if word not in ("contains", "present", "lacks", "absent", "deleted", "kept"):
            yield f"the runner does not know conntrack.{key}"
            continue
        for each in entries if isinstance(entries, list) else [entries]:
            words = _entry_words(each)
            hit = any(all(word in f"{line} " for word in words) for line in listed)
            if hit != (word in ("contains", "present", "kept")):
                yield f"conntrack {'has' if hit else 'lacks'} {each}: {listed}"


def _entry_words(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    words = [f"{entry['protocol'].lower()} "] if "protocol" in entry else []
    names = {"port": "dport", "hostPort": "dport"}
    return words + [f"{names.get(k, k)}={v} " for k, v in entry.items() if k != "protocol"]
