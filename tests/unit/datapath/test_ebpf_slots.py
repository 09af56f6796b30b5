"""Runs of backend slots: never lent twice, given back only after nobody reads them."""

from hypothesis import given
from hypothesis import strategies as st

from podwire.datapath.ebpf.slots import EMPTY, Run, Slots

sizes = st.lists(st.one_of(st.integers(0, 20), st.integers(0, 3000)), max_size=40)


def cells(runs):
    return [n for run in runs for n in range(run.first, run.first + run.size)]


@given(sizes, st.data())
def test_no_slot_is_lent_twice(wanted, data):
    slots, held = Slots(), []
    for size in wanted:
        if held and data.draw(st.booleans()):
            slots.give_back(held.pop(data.draw(st.integers(0, len(held) - 1))))
        if data.draw(st.booleans()):
            slots.settle()
        run = slots.take(size)
        assert run.size == size
        held += [run] if size else []
        assert len(set(cells(held))) == len(cells(held))
        assert max(cells(held), default=0) <= slots.top


@given(sizes)
def test_a_new_process_lends_what_lies_between(wanted):
    first = Slots()
    runs = [first.take(size) for size in wanted if size]
    kept = set(runs[::2])
    second = Slots()
    second.adopt(kept)
    more = [second.take(size) for size in wanted if size]
    assert len(set(cells([*kept, *more]))) == len(cells([*kept, *more]))


def test_a_returned_run_waits_for_its_readers():
    slots = Slots()
    run = slots.take(3)
    slots.give_back(run)
    assert slots.take(3) != run
    slots.settle()
    assert slots.take(3) == run
    assert slots.take(0) == EMPTY == Run(0, 0)
