"""Growth, rates and the forecast, from samples alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podwire.conntrack.history import WINDOWS_S, History, Sample, forecast, rates


def samples(*used: int, every_s: float = 5, limit: int = 1000) -> list[Sample]:
    return [Sample(i * every_s, count, limit, {"drop": i}) for i, count in enumerate(used)]


def test_steady_growth_is_foretold_exactly() -> None:
    found = forecast(samples(100, 150, 200, 250))
    assert (found.growth, found.full_in_s) == (10, 75)


@pytest.mark.parametrize("used", [(500, 500, 500), (500, 400, 300), (500,), ()])
def test_what_does_not_grow_does_not_fill(used: tuple[int, ...]) -> None:
    assert forecast(samples(*used)).full_in_s is None


def test_one_burst_is_no_trend() -> None:
    found = forecast(samples(100, 100, 100, 900, 100, 100, 100, 100))
    assert found.growth == 0


def test_a_flood_is_seen_within_the_last_minute() -> None:
    quiet = [100] * 50
    flood = [100 + 60 * i for i in range(12)]
    found = forecast(samples(*quiet, *flood, limit=2000))
    assert found.growth == pytest.approx(12, rel=0.2)


def test_a_slow_leak_is_seen_over_five_minutes() -> None:
    """Within a minute, noise hides it; the larger growth of both windows counts."""
    noisy = [1000 + 10 * i + (40 if i % 2 else 0) for i in range(60)]
    found = forecast(samples(*noisy, limit=10_000))
    assert found.growth == pytest.approx(2, rel=0.1)


@given(
    st.lists(st.integers(0, 10**6), min_size=3, max_size=80),
    st.integers(1, 10**6),
)
def test_the_forecast_follows_from_growth_and_room(used: list[int], limit: int) -> None:
    found = forecast(samples(*used, limit=limit))
    if found.growth > 0:
        assert found.full_in_s == pytest.approx(max(0, limit - used[-1]) / found.growth)
    else:
        assert found.full_in_s is None


def test_history_forgets_and_keeps_the_peak() -> None:
    history = History()
    for sample in samples(9, 900, *[10] * 100):
        history.add(sample)
    assert history.peak == 900
    assert history.forecast().window_s <= WINDOWS_S[-1]
    assert history.rates(60)["drop"] == pytest.approx(0.2)


def test_a_counter_that_restarts_has_no_negative_rate() -> None:
    assert rates(Sample(0, 0, 0, {"drop": 9}), Sample(1, 0, 0, {"drop": 1})) == {"drop": 0}
