"""How the table grows: samples, rates between them, and when it will be full.

The forecast's method: the growth is the median of the slopes between all pairs of samples
(Theil-Sen), which one burst or one garbage collection does not move, once over the last minute and
once over the last five; the larger one counts, so that a flood is seen at once and a slow leak too.
The time to full is what is left divided by it, as if growth stayed as it is. A table that shrinks
or stands still has none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

WINDOWS_S = (60.0, 300.0)
METHOD = "median slope of all pairs of samples (Theil-Sen) of 1 or 5 minutes, taken to go on"
LEAST = 3  # samples without which nothing is foretold
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

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque()
        self.peak = 0

    def add(self, sample: Sample) -> None:
        self._samples.append(sample)
        self.peak = max(self.peak, sample.used)
        while sample.at_s - self._samples[0].at_s > WINDOWS_S[-1]:
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
    """Growth and time to full."""
    if len(samples) < LEAST:
        return Forecast(0.0, None, len(samples), 0.0)
    last = samples[-1]
    growth, chosen = max(
        (
            (_growth(recent), recent)
            for window_s in WINDOWS_S
            for recent in [[s for s in samples if last.at_s - s.at_s <= window_s]]
            if len(recent) >= LEAST
        ),
        key=lambda pair: pair[0],
        default=(0.0, list(samples)),
    )
    left = max(0, last.limit - last.used)
    full_in_s = left / growth if growth > 0 and last.limit else None
    return Forecast(growth, full_in_s, len(chosen), last.at_s - chosen[0].at_s)


def _growth(samples: Sequence[Sample]) -> float:
    """Entries per second; 0 where no time passed."""
    slopes = list(_slopes(_thinned(samples)))
    return median(slopes) if slopes else 0.0


def _slopes(samples: Sequence[Sample]) -> Iterable[float]:
    for index, first in enumerate(samples):
        for later in samples[index + 1 :]:
            if later.at_s > first.at_s:
                yield (later.used - first.used) / (later.at_s - first.at_s)


def _thinned(samples: Sequence[Sample]) -> Sequence[Sample]:
    """At most `_MOST`, evenly, the last one always."""
    step = -(-len(samples) // _MOST) or 1
    return samples[::-1][::step][::-1]
