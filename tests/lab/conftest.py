"""Labs for the tests: each has a name of its own, and is taken away whatever happens."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest

from podwire.lab import cgroups, mounts, state, teardown
from podwire.lab.cluster import Lab
from podwire.lab.state import LabDir

_numbers = itertools.count()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() != 0:
        for item in items:
            item.add_marker(pytest.mark.skip(reason="a lab needs root"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What the processes of this worker's labs said last is part of every failure."""
    report = yield
    if report.failed:
        for name in filter(_ours, state.names()):
            for process, text in LabDir(name).last_words().items():
                report.sections.append((f"{name}: {process}", text))
    return report


def _ours(lab: str) -> bool:
    return lab.startswith(f"pwt-{os.getpid()}-")


@pytest.fixture
def make_lab() -> Iterator[Callable[..., Lab]]:
    """Brings labs up; their nodes are ready when it returns."""
    yield from _maker()


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Callable[..., Lab]]:
    """The same for a lab that all tests of a file share."""
    yield from _maker()


def _maker() -> Iterator[Callable[..., Lab]]:
    made: list[str] = []

    def make(**options: Any) -> Lab:
        name = f"pwt-{os.getpid()}-{next(_numbers)}"
        made.append(name)
        lab = Lab.up(name, **options)
        lab.wait(120)
        return lab

    yield make
    for name in made:
        teardown.down(LabDir(name))


def left_of(name: str) -> list[str]:
    """Whatever of a lab is still on the machine."""
    directory, cgroup = LabDir(name), cgroups.of_lab(name)
    found = [str(path) for path in mounts.below(directory.path)]
    found += [str(path) for path in (directory.path, cgroup) if path is not None and path.exists()]
    return found


def wait_for(holds: Callable[[], bool], seconds: float = 120) -> None:
    """Until it comes true; asserts that it does in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "did not come true"
        time.sleep(0.05)
