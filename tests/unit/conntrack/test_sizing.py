"""The sizing rules, from a machine's figures."""

from __future__ import annotations

from dataclasses import replace

import pytest

from podwire.conntrack.sizing import (
    MODPROBE_FILE,
    SYSCTL_FILE,
    Machine,
    advise,
    kube_proxy_limit,
)

SMALL = Machine(memory_mb=2048, cores=2, limit=65536, buckets=65536, peak=1000, entry_bytes=384)


@pytest.mark.parametrize(
    ("cores", "per_core", "least", "limit"),
    [
        (1, 32768, 131072, 131072),
        (8, 32768, 131072, 262144),
        (64, 32768, 131072, 1048576),
        (4, 0, 131072, 0),
        (4, 1000, 0, 4000),
    ],
)
def test_kube_proxys_rule(cores: int, per_core: int, least: int, limit: int) -> None:
    assert kube_proxy_limit(cores, per_core, least) == limit


def test_rules_stand_side_by_side_with_their_memory() -> None:
    rules = {rule.name: rule for rule in advise(SMALL).rules}
    assert rules["RAM in MB × 16"].limit == 32768
    assert rules["kube-proxy"].limit == 131072
    assert rules["kernel default"].limit == 131072
    assert rules["peak × 2"].limit == 2000
    assert rules["kube-proxy"].bytes == 131072 * (384 + 8)


def test_the_largest_rule_is_advised() -> None:
    advice = advise(SMALL)
    assert advice.limit == 131072
    assert advice.sysctls == {
        "net.netfilter.nf_conntrack_max": 131072,
        "net.netfilter.nf_conntrack_buckets": 131072,
    }
    assert advice.persistent == {
        SYSCTL_FILE: "net.netfilter.nf_conntrack_max = 131072\n"
        "net.netfilter.nf_conntrack_buckets = 131072\n",
        MODPROBE_FILE: "options nf_conntrack hashsize=131072\n",
    }


def test_a_peak_beyond_every_rule_counts_twice() -> None:
    advice = advise(replace(SMALL, peak=100_000))
    assert advice.limit >= 200_000
    assert advice.reason.startswith("peak × 2")


def test_a_table_that_is_large_enough_stays() -> None:
    advice = advise(replace(SMALL, limit=1_000_000))
    assert advice.limit == 1_000_000
    assert "as large as every rule asks" in advice.reason
