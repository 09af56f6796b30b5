"""The commands of README.md, as they are written there, in one shell."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from podwire.lab import teardown
from podwire.lab.state import LabDir

ROOT = Path(__file__).resolve().parents[2]
NAME = f"pwt-{os.getpid()}-readme"
SECTION = re.search(r"## In a minute\n(.*?)\n## ", (ROOT / "README.md").read_text(), re.DOTALL)
COMMANDS = re.findall(r"^    ((?:podwire|kubectl|export) .*)$", SECTION[1] if SECTION else "", re.M)
ARROW = re.compile(r"pod shop/cache-0 .* → Service shop/api → shop/api-.*:9000/TCP: deny")


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    yield {**os.environ, "PODWIRE_LAB": NAME, "PWT_PYTHON": sys.executable}
    teardown.down(LabDir(NAME))


def test_the_minute(environment: dict[str, str]) -> None:
    script = 'podwire() { "$PWT_PYTHON" -m podwire "$@"; }\nset -e\n'
    *before, why = [c for c in COMMANDS if not c.startswith("kubectl") or shutil.which("kubectl")]
    assert why.startswith("podwire policy why")
    ran = subprocess.run(
        ["bash"],
        input=script + "\n".join([*before, f"{why} || echo status=$?", "podwire lab down"]),
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "2 nodes" in ran.stdout
    assert re.search(r"\(a pod of node\d\) → .*: dnat, ClusterIP", ran.stdout)
    assert ran.stdout.count("healthy") == 2
    assert len(ARROW.findall(ran.stdout)) == 4
    assert "status=1" in ran.stdout
    shown = [line.strip() for line in SECTION[1].splitlines() if "only-web" in line]
    assert shown
    for line in shown:
        assert line in ran.stdout
