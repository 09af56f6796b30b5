"""Agents die while policies change under traffic: nothing breaks, and nobody slips through."""

from tests.kernel.ebpf_world import NEEDS_EBPF, World
from tests.kernel.policy_storm import APPS, Storm

pytestmark = NEEDS_EBPF


def test_no_packet_is_judged_by_a_state_that_is_half_written():
    """Three and two here; fifty and ten in `make bench BENCH=upgrade`."""
    with World(pods=len(APPS)) as world:
        storm = Storm(world)
        storm.run(3, 2)
    assert storm.changes >= 6
    assert all(probe.sent > 20 for probe in (*storm.allowed, *storm.denied))
