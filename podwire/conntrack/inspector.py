"""What people ask of one table, answered as JSON: status, ls, top, watch, advise, flush.

The agent answers from here on its control socket, and the command line does so by itself where no
agent runs (then without names).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

from podwire.conntrack import facts, rows, sizing, stale
from podwire.conntrack.attribution import Tally
from podwire.conntrack.history import METHOD, History, Sample
from podwire.conntrack.names import Names
from podwire.conntrack.selection import parse
from podwire.conntrack.source import SeesSockets, Source
from podwire.errors import InvalidObject, PodwireError
from podwire.kernel.ctnetlink import EventKind, Events, Table
from podwire.kernel.ctnetlink.entries import Entry

MOST_ROWS = 1000
PRESSURE = 0.8
"""The part of the limit from which a table counts as nearly full."""

_RATES = (
    "insert", "insert_failed", "drop", "early_drop", "invalid", "clash_resolve", "chaintoolong",
    "search_restart", "connections_full", "ports_exhausted",
)  # fmt: skip


class Inspector:
    """One source of entries, with names and history."""

    def __init__(
        self, source: Source, names: Callable[[], Names], netns_fd: int | None = None
    ) -> None:
        self.source = source
        self.names = names
        self.history = History()
        self._netns = netns_fd

    def sample(self) -> Sample:
        """Count and counters now, noted in the history. Cheap: no entry is read."""
        usage = self.source.usage()
        sample = Sample(time.monotonic(), usage.used, usage.limit, self.source.statistics())
        self.history.add(sample)
        return sample

    def tally(self) -> Tally:
        """The whole table, attributed."""
        tally = Tally(self.names())
        for portion in self.source.flow_counts():
            tally.add(portion)
        return tally

    # --- answers ----------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """How full, how fast, what is lost, what it costs."""
        sample = self.sample()
        here = facts.settings(self._netns)
        forecast = self.history.forecast()
        rates = self.history.rates()
        counters = sample.counters
        answer: dict[str, Any] = {
            "source": self.source.name,
            "used": sample.used,
            "limit": sample.limit,
            "percent": round(100 * sample.used / sample.limit, 1) if sample.limit else None,
            "pressure": sample.limit > 0 and sample.used >= PRESSURE * sample.limit,
            "peak": self.history.peak,
            "growth_per_s": round(forecast.growth, 2),
            "full_in_s": None if forecast.full_in_s is None else round(forecast.full_in_s),
            "method": f"{METHOD}; {forecast.samples} samples in {forecast.window_s:.0f} s",
            "counters": {name: counters[name] for name in _RATES if name in counters},
            "rates": {name: round(rates[name], 2) for name in _RATES if name in rates},
            "accounting": here.accounting,
            "timestamps": here.timestamps,
            "tcp_be_liberal": here.tcp_be_liberal,
            "timeouts": here.timeouts,
        }
        if self.source.name == "kernel":
            answer |= _memory(here, sample.used) | _full_messages(self._netns)
        return answer

    def top(self, query: Mapping[str, str]) -> dict[str, Any]:
        """The table by pod, Service, remote, node, state, kind and SNAT target; `most` of each."""
        sample = self.sample()
        forecast = self.history.forecast()
        began = time.perf_counter()
        tally = self.tally()
        here = facts.settings(self._netns)
        return {
            "source": self.source.name,
            "used": sample.used,
            "limit": sample.limit,
            "growth_per_s": round(forecast.growth, 2),
            "full_in_s": None if forecast.full_in_s is None else round(forecast.full_in_s),
            "rates": {k: round(v, 2) for k, v in self.history.rates(10).items() if k in _RATES},
            "read_ms": round((time.perf_counter() - began) * 1000, 1),
            **rows.tally_groups(tally, here.local_ports, _number(query, "most", 100)),
        }

    def ls(self, query: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        """Entries that fit the query, at most `limit` (0: all); then one row with ``more``."""
        selection, names = parse(query), self.names()
        limit = _number(query, "limit", MOST_ROWS)
        more = 0
        found = selection.entries(self.source, names)
        if isinstance(self.source, SeesSockets):
            untracked = self.source.untracked()
            found = chain(found, (each for each in untracked if selection.fits(each, names)))
        for index, entry in enumerate(found):
            if limit and index >= limit:
                more += 1
            else:
                yield rows.entry_row(entry, names)
        if more:
            yield {"more": more}

    def watch(self, query: Mapping[str, str], stop: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        """Events that fit, as they come. After an overrun: ``LOST``, then the table anew as
        ``EXISTING``. An empty row now and then lets the reader see whether to go on.
        """
        selection, names = parse(query), self.names()
        if not isinstance(self.source, Table):
            raise InvalidObject("the eBPF data path's map has no events; use top or ls")
        with Events(netns_fd=self._netns) as events:
            while not stop():
                if not events.wait(0.5):
                    names = self.names()
                    yield {}
                    continue
                lost = False
                for event in events.drain():
                    lost = lost or event.kind is EventKind.LOST
                    entry = event.entry
                    if entry is not None and selection.fits(entry, names):
                        yield _event(event.kind.value, entry, names)
                if lost:
                    yield {"event": EventKind.LOST.value}
                    for entry in selection.entries(self.source, names):
                        yield _event("EXISTING", entry, names)

    def advise(self) -> dict[str, Any]:
        """The sizing rules side by side, and the lines that set what is advised."""
        self.sample()
        machine = facts.machine(self._netns, self.history.peak)
        advice = sizing.advise(machine)
        return {
            "rules": [rule._asdict() for rule in advice.rules],
            "limit": advice.limit,
            "buckets": advice.buckets,
            "reason": advice.reason,
            "sysctls": advice.sysctls,
            "persistent": advice.persistent,
            "refusal": facts.settings(self._netns).refusal,
        }

    def apply(self) -> dict[str, Any]:
        """Set what `advise` advises. Raises PodwireError with the reason where that cannot be."""
        answer = self.advise()
        facts.apply(answer["sysctls"], self._netns)
        return answer | {"applied": True}

    def flush(self, query: Mapping[str, str]) -> dict[str, Any]:
        """What would go; with ``yes`` in the query, it goes. One of pod, service, target, address,
        namespace, or ``stale`` (UDP entries to what no longer serves), is needed.
        """
        if query.get("stale"):
            return self._flush_stale(bool(query.get("yes")))
        selection, names = parse(query), self.names()
        if not selection:
            raise InvalidObject("say what to flush: a pod, a Service, a target or --stale")
        doomed: list[Entry] = []
        count = 0
        for entry in selection.entries(self.source, names):
            count += 1
            if not selection.exact or len(doomed) < MOST_ROWS:
                doomed.append(entry)
        answer: dict[str, Any] = {
            "entries": count,
            "sample": [rows.entry_row(entry, names) for entry in doomed[:20]],
            "deleted": False,
        }
        if query.get("yes") and count:
            if selection.exact:
                for filter_ in selection.filters(names):
                    self.source.delete(filter_)
            else:
                self.source.delete_entries(doomed)
            answer["deleted"] = True
        return answer

    def _flush_stale(self, yes: bool) -> dict[str, Any]:
        services = self.names().services
        if services is None or not isinstance(self.source, Table):
            raise InvalidObject("stale entries are told by an agent that serves Services")
        judge = stale.judge_all(services)
        found = stale.remove(self.source, judge).groups if yes else stale.find(self.source, judge)
        return {
            "entries": sum(found.values()),
            "groups": stale.group_rows(found, self.names()),
            "deleted": yes and bool(found),
        }


def _event(kind: str, entry: Entry, names: Names) -> dict[str, Any]:
    return {"event": kind, "at_s": round(time.time(), 3), **rows.entry_row(entry, names)}


def _memory(here: facts.Settings, used: int) -> dict[str, Any]:
    slab = facts.slab()
    everywhere = slab.objects if slab.objects is not None else used
    return {
        "buckets": here.buckets,
        "entries_everywhere": everywhere,
        "chain_length": round(2 * everywhere / here.buckets, 3),  # an entry is in the hash twice
        "entry_bytes": here.entry_bytes,
        "memory_bytes": used * here.entry_bytes,
        "memory_full_bytes": here.limit * here.entry_bytes,
        "hash_bytes": here.buckets * sizing.BUCKET_BYTES,
    }


def _full_messages(netns_fd: int | None) -> dict[str, Any]:
    try:
        found = facts.full_messages(netns_fd)
    except PodwireError as error:
        return {"full_messages": None, "full_messages_error": str(error)}
    return {
        "full_messages": len(found),
        "last_full_s": round(found[-1].at_s) if found else None,
    }


def _number(query: Mapping[str, str], name: str, default: int) -> int:
    text = query.get(name, "")
    if text and not text.isdecimal():
        raise InvalidObject(f"{name} takes a number, not {text!r}")
    return int(text) if text else default
