import pytest

from podwire.agent.endpoints import Health, split_bind
from podwire.errors import ConfigError


def test_healthy_needs_a_first_sync_and_no_old_queue() -> None:
    health = Health(timeout_s=60)
    assert not health.healthy(1000)
    health.last_updated = 990
    assert health.healthy(1000)
    health.queued_since = 995
    assert health.healthy(1000)
    assert not health.healthy(1056)


def test_body_is_kube_proxys() -> None:
    health = Health(timeout_s=60, last_updated=0.5, node_eligible=False)
    assert health.body(1) == {
        "lastUpdated": "1970-01-01T00:00:00Z",
        "currentTime": "1970-01-01T00:00:01Z",
        "nodeEligible": False,
        "healthy": True,
        "status": {
            "IPv4": {"lastUpdated": "1970-01-01T00:00:00Z", "healthy": True},
            "IPv6": {"lastUpdated": "1970-01-01T00:00:00Z", "healthy": True},
        },
    }


@pytest.mark.parametrize(
    ("text", "bind"), [("0.0.0.0:10256", ("0.0.0.0", 10256)), ("[::1]:0", ("::1", 0))]
)
def test_bind_addresses(text: str, bind: tuple[str, int]) -> None:
    assert split_bind(text) == bind


@pytest.mark.parametrize("text", ["10256", "a:b", "a:70000"])
def test_bad_bind_addresses(text: str) -> None:
    with pytest.raises(ConfigError):
        split_bind(text)
