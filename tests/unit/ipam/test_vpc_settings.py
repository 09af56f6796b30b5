from __future__ import annotations

import pytest

from podwire.errors import ConfigError
from podwire.ipam.vpc.settings import Settings, read_settings
from podwire.net import parse_prefix


def test_defaults() -> None:
    assert read_settings({}) == Settings()
    assert Settings().warm_eni_target == 1
    assert not Settings().ip_targets


def test_reads_the_names_users_know() -> None:
    settings = read_settings(
        {
            "WARM_IP_TARGET": "5",
            "MINIMUM_IP_TARGET": "0",
            "MAX_ENI": "0",
            "AWS_VPC_K8S_CNI_EXTERNALSNAT": "true",
            "AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS": "10.12.0.0/16, 10.13.0.0/16",
            "AWS_VPC_K8S_CNI_CONNMARK": "0x40",
            "ADDITIONAL_ENI_TAGS": '{"team": "net"}',
            "IP_COOLDOWN_PERIOD": "0",
        }
    )
    assert (settings.warm_ip_target, settings.minimum_ip_target, settings.max_eni) == (5, 0, None)
    assert settings.ip_targets
    assert settings.external_snat
    assert settings.exclude_snat_cidrs == (
        parse_prefix("10.12.0.0/16"),
        parse_prefix("10.13.0.0/16"),
    )
    assert settings.connmark == 0x40
    assert settings.additional_eni_tags == {"team": "net"}
    assert settings.cooldown_s == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WARM_ENI_TARGET", "many"),
        ("IP_COOLDOWN_PERIOD", "-1"),
        ("AWS_VPC_K8S_CNI_CONNMARK", "0x60"),
        ("AWS_VPC_K8S_CNI_VETHPREFIX", "vlan"),
        ("AWS_VPC_ENI_MTU", "575"),
        ("AWS_VPC_ENI_MTU", "9002"),
        ("AWS_VPC_K8S_CNI_RANDOMIZESNAT", "dice"),
        ("AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS", "10.0.0.0/33"),
        ("AWS_VPC_K8S_CNI_EXTERNALSNAT", "perhaps"),
        ("ENABLE_PREFIX_DELEGATION", "true"),  # without any target above 0
        ("ENABLE_IPv6", "true"),  # IPv6 is by prefixes only
        ("ADDITIONAL_ENI_TAGS", "[]"),
    ],
)
def test_nonsense_is_named(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name):
        read_settings({name: value})


def test_the_mtu_of_ipv6_is_1280_at_least() -> None:
    environment = {"ENABLE_IPv6": "1", "ENABLE_PREFIX_DELEGATION": "1", "WARM_PREFIX_TARGET": "1"}
    read_settings(environment | {"AWS_VPC_ENI_MTU": "1280"})
    with pytest.raises(ConfigError, match="1280"):
        read_settings(environment | {"AWS_VPC_ENI_MTU": "1279"})
