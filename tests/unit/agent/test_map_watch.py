from podwire.datapath.ebpf.fill import Fill, Pressure


def test_a_map_is_nearly_full_once_and_until_it_is_well_below() -> None:
    pressure = Pressure()
    seen = [
        [str(fill) for fill in pressure.see([Fill("endpoints", held, 100)])]
        for held in (79, 80, 95, 76, 74, 81)
    ]
    sentence = "eBPF map endpoints is {0}% full ({0} of 100): pods beyond it cannot be added"
    assert seen == [[], [sentence.format(80)], [], [], [], [sentence.format(81)]]


def test_what_is_told_follows_the_map() -> None:
    pressure = Pressure()
    pressure.see([Fill("affinities", 80, 100)])
    pressure.see([Fill("affinities", 78, 100)])
    assert pressure.full == {"affinities": Fill("affinities", 78, 100)}
    pressure.see([Fill("affinities", 10, 100)])
    assert pressure.full == {}
