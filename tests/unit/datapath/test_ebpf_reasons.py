from podwire.datapath.ebpf.events import WORDS
from podwire.datapath.ebpf.layout import Reason


def test_every_outcome_has_words():
    assert set(WORDS) == set(Reason)
