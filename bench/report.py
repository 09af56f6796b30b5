"""Samples in, a table and a JSON file out; every script of this folder ends with one `Report`.

report = Report("cni", "ADD and DEL beside Debian's bridge and host-local")
report.row("ADD", ours, "ms", peer=theirs, ratio_at_most=0.5)
report.row("lab up", [1.3, 1.4, 1.2], "s", at_most=2)
sys.exit(report.finish())
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).with_name("results")
PRODUCT = Path(__file__).parents[1] / "podwire"


class Report:
    """Rows of samples, each beside its peer and its goal."""

    def __init__(self, name: str, title: str, folder: Path = RESULTS) -> None:
        self.name = name
        self.title = title
        self.rows: list[dict[str, Any]] = []
        self._file = folder / f"{name}.json"

    def row(
        self,
        label: str,
        samples: Sequence[float],
        unit: str,
        *,
        peer: Sequence[float] | None = None,
        ratio_at_most: float | None = None,
        ratio_at_least: float | None = None,
        at_most: float | None = None,
        at_least: float | None = None,
        ratios: Sequence[float] | None = None,
    ) -> None:
        """Add a line. Goals hold for the median (`ratio_…`: ours divided by the peer's).

        `ratios` are those of rounds that measured both: their median is the ratio, then.
        """
        ours = summary(samples)
        row: dict[str, Any] = {"label": label, "unit": unit, **ours}
        judged = ours["p50"]
        bounds = (at_most, at_least)
        if peer:
            theirs = summary(peer)
            row["peer"] = theirs
            row["ratio"] = ours["p50"] / theirs["p50"] if theirs["p50"] else float("inf")
            if ratios:
                row["ratio"] = median(ratios)
                row["ratio_quartiles"] = _quartiles(ratios)
            if ratio_at_most is not None or ratio_at_least is not None:
                judged, bounds = row["ratio"], (ratio_at_most, ratio_at_least)
        upper, lower = bounds
        sign = " ×" if judged is not ours["p50"] else f" {unit}"
        goals = [f"{s} {b:g}{sign}" for s, b in (("≤", upper), ("≥", lower)) if b is not None]
        if goals:
            row["goal"] = ", ".join(goals)
            row["met"] = (upper is None or judged <= upper) and (lower is None or judged >= lower)
        self.rows.append(row)

    def absent(self, label: str, why: str) -> None:
        """Add a line for what could not be measured."""
        self.rows.append({"label": label, "absent": why})

    def finish(self) -> int:
        """Write the JSON file, print the table; 1 when a goal was missed, else 0."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "name": self.name,
            "title": self.title,
            "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": {"kernel": platform.release(), "cpus": os.cpu_count()},
            "modules": modules(),
            "rows": self.rows,
        }
        self._file.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        print(f"{self.title} (Linux {platform.release()}, {os.cpu_count()} CPUs, {modules()})\n")
        print(self.table())
        return 0 if all(row.get("met", True) for row in self.rows) else 1

    def table(self) -> str:
        lines = [("", "p50", "p99", "min…max", "n", "peer p50", "peer p99", "ratio", "goal", "")]
        lines.extend(_line(row) for row in self.rows)
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        shown = [i for i, width in enumerate(widths) if width]
        return "\n".join(
            "  ".join(
                line[i].ljust(widths[i]) if i in (0, 8, 9) else line[i].rjust(widths[i])
                for i in shown
            ).rstrip()
            for line in lines
        )


def modules(folder: Path = PRODUCT) -> str:
    """Whether what is measured is compiled, as it is where it was installed: a start depends on it.

    A compiled module bears the time and the size of its source (PEP 552).
    """
    sources = list(folder.rglob("*.py"))
    stale = 0
    for source in sources:
        compiled = Path(importlib.util.cache_from_source(str(source)))
        of = source.stat()
        wanted = struct.pack("<II", int(of.st_mtime) & 0xFFFFFFFF, of.st_size & 0xFFFFFFFF)
        stale += not compiled.exists() or compiled.read_bytes()[8:16] != wanted
    return f"{stale} of {len(sources)} modules not compiled" if stale else "modules compiled"


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile (nearest rank), extremes and count."""
    ordered = sorted(samples)
    return {
        "p50": median(ordered),
        "p99": ordered[max(0, -(-len(ordered) * 99 // 100) - 1)],
        "min": ordered[0],
        "max": ordered[-1],
        "n": len(ordered),
    }


def _quartiles(samples: Sequence[float]) -> list[float]:
    ordered = sorted(samples)
    return [ordered[len(ordered) // 4], ordered[(3 * len(ordered) - 1) // 4]]


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    if "absent" in row:
        return (row["label"], *[""] * 7, f"not measured: {row['absent']}", "")
    unit, peer = row["unit"], row.get("peer")
    return (
        row["label"],
        f"{_figure(row['p50'])} {unit}",
        _figure(row["p99"]),
        f"{_figure(row['min'])}…{_figure(row['max'])}",
        str(row["n"]),
        f"{_figure(peer['p50'])} {unit}" if peer else "",
        _figure(peer["p99"]) if peer else "",
        _ratio(row) if peer else "",
        row.get("goal", ""),
        {True: "MET", False: "MISSED", None: ""}[row.get("met")],
    )


def _ratio(row: dict[str, Any]) -> str:
    if "ratio_quartiles" not in row:
        return f"{row['ratio']:.2f} ×"
    low, high = row["ratio_quartiles"]
    return f"{row['ratio']:.3f} × ({low:.3f}…{high:.3f})"


def _figure(value: float) -> str:
    """Three significant digits, without an exponent for what people read."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
