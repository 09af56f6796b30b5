"""The settings of VPC mode, under the names that users of the AWS VPC CNI know."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from podwire.errors import ConfigError, InvalidObject
from podwire.net import Prefix, parse_prefix

DEFAULT_MARK = 0x80


@dataclass(frozen=True)
class Settings:
    """What the environment asks for. Unset targets are None, not 0: 0 is a target of its own."""

    warm_eni_target: int = 1
    warm_ip_target: int | None = None
    minimum_ip_target: int | None = None
    warm_prefix_target: int | None = None
    prefix_delegation: bool = False
    ipv6: bool = False
    max_eni: int | None = None  # below the instance type's own limit
    cooldown_s: float = 30.0
    mtu: int = 9001
    veth_prefix: str = "eni"
    external_snat: bool = False
    exclude_snat_cidrs: tuple[Prefix, ...] = ()
    external_service_cidrs: tuple[Prefix, ...] = ()
    random_ports: str = "prng"  # prng: fully random, hashrandom: random, none
    connmark: int = DEFAULT_MARK
    custom_networking: bool = False
    eni_config_label: str = "k8s.amazonaws.com/eniConfig"
    subnet_discovery: bool = True
    manage_untagged_eni: bool = True
    manage_enis_non_schedulable: bool = False
    pod_eni: bool = False
    disable_leaked_eni_cleanup: bool = False
    additional_eni_tags: Mapping[str, str] = field(default_factory=dict[str, str])
    cluster_name: str = ""
    introspection_bind_address: str = "127.0.0.1:61679"
    disable_introspection: bool = False

    @property
    def ip_targets(self) -> bool:
        """Whether addresses are counted one by one: WARM_IP_TARGET or MINIMUM_IP_TARGET is set."""
        return self.warm_ip_target is not None or self.minimum_ip_target is not None


def read_settings(environment: Mapping[str, str]) -> Settings:
    """The settings in `environment`. Raises ConfigError that names the variable."""
    reader = _Reader(environment)
    settings = Settings(
        warm_eni_target=_or(reader.number("WARM_ENI_TARGET"), 1),
        warm_ip_target=reader.number("WARM_IP_TARGET"),
        minimum_ip_target=reader.number("MINIMUM_IP_TARGET"),
        warm_prefix_target=reader.number("WARM_PREFIX_TARGET"),
        prefix_delegation=reader.flag("ENABLE_PREFIX_DELEGATION", False),
        ipv6=reader.flag("ENABLE_IPv6", False),
        max_eni=reader.number("MAX_ENI") or None,  # the original reads 0 as "no limit"
        cooldown_s=_or(reader.number("IP_COOLDOWN_PERIOD"), 30),
        mtu=_or(reader.number("AWS_VPC_ENI_MTU"), 9001),
        veth_prefix=reader.text("AWS_VPC_K8S_CNI_VETHPREFIX", "eni"),
        external_snat=reader.flag("AWS_VPC_K8S_CNI_EXTERNALSNAT", False),
        exclude_snat_cidrs=reader.prefixes("AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS"),
        external_service_cidrs=reader.prefixes("AWS_EXTERNAL_SERVICE_CIDRS"),
        random_ports=reader.text("AWS_VPC_K8S_CNI_RANDOMIZESNAT", "prng"),
        connmark=_or(reader.number("AWS_VPC_K8S_CNI_CONNMARK"), DEFAULT_MARK),
        custom_networking=reader.flag("AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG", False),
        eni_config_label=reader.text("ENI_CONFIG_LABEL_DEF", "k8s.amazonaws.com/eniConfig"),
        subnet_discovery=reader.flag("ENABLE_SUBNET_DISCOVERY", True),
        manage_untagged_eni=reader.flag("MANAGE_UNTAGGED_ENI", True),
        manage_enis_non_schedulable=reader.flag("AWS_MANAGE_ENIS_NON_SCHEDULABLE", False),
        pod_eni=reader.flag("ENABLE_POD_ENI", False),
        disable_leaked_eni_cleanup=reader.flag("DISABLE_LEAKED_ENI_CLEANUP", False),
        additional_eni_tags=reader.tags("ADDITIONAL_ENI_TAGS"),
        cluster_name=reader.text("CLUSTER_NAME", ""),
        introspection_bind_address=reader.text("INTROSPECTION_BIND_ADDRESS", "127.0.0.1:61679"),
        disable_introspection=reader.flag("DISABLE_INTROSPECTION", False),
    )
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    if settings.veth_prefix != "eni":  # rules and the wiring know pods' links by it
        raise ConfigError("AWS_VPC_K8S_CNI_VETHPREFIX: only eni", field=settings.veth_prefix)
    if settings.connmark.bit_count() != 1:
        raise ConfigError(f"AWS_VPC_K8S_CNI_CONNMARK: {settings.connmark:#x} is not one bit")
    least = 1280 if settings.ipv6 else 576
    if not least <= settings.mtu <= 9001:
        raise ConfigError(f"AWS_VPC_ENI_MTU: {settings.mtu} is not in {least}..9001")
    if settings.random_ports not in ("prng", "hashrandom", "none"):
        raise ConfigError("AWS_VPC_K8S_CNI_RANDOMIZESNAT: prng, hashrandom or none")
    if settings.prefix_delegation and not settings.ipv6:
        targets = (
            settings.warm_prefix_target,
            settings.warm_ip_target,
            settings.minimum_ip_target,
        )
        if not any(targets):
            raise ConfigError(
                "ENABLE_PREFIX_DELEGATION needs WARM_PREFIX_TARGET, WARM_IP_TARGET or"
                " MINIMUM_IP_TARGET above 0"
            )
    if settings.ipv6 and not settings.prefix_delegation:
        raise ConfigError("ENABLE_IPv6 needs ENABLE_PREFIX_DELEGATION=true")


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


@dataclass(frozen=True)
class _Reader:
    environment: Mapping[str, str]

    def text(self, name: str, default: str) -> str:
        return self.environment.get(name, "").strip() or default

    def number(self, name: str) -> int | None:
        text = self.environment.get(name, "").strip()
        if not text:
            return None
        try:
            value = int(text, 0)
        except ValueError:
            raise ConfigError(f"{name}: not a number: {text!r}") from None
        if value < 0:
            raise ConfigError(f"{name}: {value} is below 0")
        return value

    def flag(self, name: str, default: bool) -> bool:
        text = self.environment.get(name, "").strip().lower()
        if text in ("", "true", "1", "t"):
            return default if not text else True
        if text in ("false", "0", "f"):
            return False
        raise ConfigError(f"{name}: true or false, not {text!r}")

    def prefixes(self, name: str) -> tuple[Prefix, ...]:
        words = self.environment.get(name, "").split(",")
        try:
            return tuple(parse_prefix(word) for word in words if word.strip())
        except InvalidObject as error:
            raise ConfigError(f"{name}: {error}") from None

    def tags(self, name: str) -> Mapping[str, str]:
        text = self.environment.get(name, "").strip()
        try:
            value: Any = json.loads(text or "{}")
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise ConfigError(f"{name}: a JSON object of strings, not {text!r}")
        return {str(key): str(word) for key, word in cast("dict[object, object]", value).items()}
