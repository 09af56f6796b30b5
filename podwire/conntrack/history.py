"""How the table grows: samples, rates between them, and when it will be full.

The forecast's method: the growth is the median of the slopes between all pairs of samples of the
last `WINDOW_S` seconds (Theil-Sen), which one burst or one garbage collection does not move; the
time to full is what is left divided by it, as if growth stayed as it is. A table that shrinks or
stands still has none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

WINDOW_S = 300.0
METHOD = "median slope of all pairs of samples (Theil-Sen), taken to go on"
_MOST = 60  # samples that a forecast uses: 1,770 pairs


class Sample(NamedTuple):
    """The table at a moment of a monotonic clock."""

    at_s: float
    used: int
    limit: int
    counters: Mapping[str, int]


class Forecast(NamedTuple):
    """`growth` is in entries per second; `full_in_s` None: not foreseeable."""

    growth: float
    full_in_s: float | None
    samples: int
    window_s: float


class History:
    """The last samples, and the highest use since the first."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._samples: deque[Sample] = deque()
        self.peak = 0

    def add(self, sample: Sample) -> None:
        self._samples.append(sample)
        self.peak = max(self.peak, sample.used)
        while sample.at_s - self._samples[0].at_s > self._window_s:
            self._samples.popleft()

    @property
    def last(self) -> Sample | None:
        return self._samples[-1] if self._samples else None

    def forecast(self) -> Forecast:
        return forecast(tuple(self._samples))

    def rates(self, over_s: float = 60.0) -> dict[str, float]:
        """Each counter's increase per second over the last samples."""
        samples = tuple(self._samples)  # another thread may add one meanwhile
        if len(samples) < 2:
            return {}
        last = samples[-1]
        first = next(sample for sample in samples if last.at_s - sample.at_s <= over_s)
        return rates(samples[-2] if first is last else first, last)


def rates(first: Sample, last: Sample) -> dict[str, float]:
    """Increases per second between two samples."""
    elapsed = max(last.at_s - first.at_s, 1e-9)
    return {
        name: max(0, value - first.counters.get(name, 0)) / elapsed
        for name, value in last.counters.items()
    }


def forecast(samples: Sequence[Sample]) -> Forecast:
    """Growth and time to full; no growth from fewer than two samples."""
    chosen = _thinned(samples)
    if len(chosen) < 2:
        return Forecast(0.0, None, len(samples), 0.0)
    growth = median(_slopes(chosen))
    last = chosen[-1]
    left = max(0, last.limit - last.used)
    full_in_s = left / growth if growth > 0 and last.limit else None
    return Forecast(growth, full_in_s, len(samples), last.at_s - chosen[0].at_s)


def _slopes(samples: Sequence[Sample]) -> Iterable[float]:
    for index, first in enumerate(samples):
        for later in samples[index + 1 :]:
            if later.at_s > first.at_s:
                yield (later.used - first.used) / (later.at_s - first.at_s)


def _thinned(samples: Sequence[Sample]) -> Sequence[Sample]:
    """At most `_MOST`, evenly, the last one always."""
    step = -(-len(samples) // _MOST) or 1
    return samples[::-1][::step][::-1]
