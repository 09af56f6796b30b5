"""VPC mode in the agent: the address manager, the ENIs' links, the rules, and who asks for them."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping

import msgspec
from aiohttp import web

from podwire.agent.control import ControlServer
from podwire.agent.logs import event
from podwire.agent.node import leaving
from podwire.agent.options import Options
from podwire.agent.watch import Watcher
from podwire.cni.assembly import boot_time, restored_pool
from podwire.datapath.iptables import vpc as iptables
from podwire.datapath.nftables import vpc as nftables
from podwire.datapath.vpc import VpcTable
from podwire.errors import KernelError, PodwireError
from podwire.ipam.state import State
from podwire.ipam.vpc import introspection
from podwire.ipam.vpc.cloud import Instance
from podwire.ipam.vpc.ec2 import Ec2, LateInvoke
from podwire.ipam.vpc.imds import DEFAULT_ENDPOINT, Imds
from podwire.ipam.vpc.manager import Manager, Node
from podwire.ipam.vpc.metrics import Metrics
from podwire.ipam.vpc.settings import read_settings
from podwire.ipam.vpc.threads import POOL, WAIT_S, VpcPool
from podwire.kernel import link, sysctl
from podwire.kernel.netlink import NetlinkSocket
from podwire.kube import objects
from podwire.kube.store import Store
from podwire.net import parse_mac
from podwire.wiring import Attachment, Key, Pod
from podwire.wiring.eni import EniLinks
from podwire.wiring.routed import RoutedWiring

log = logging.getLogger("podwire.agent.vpc")

KEEP_EVERY_S = 10.0
_OPTIMISTIC_MTU = 9001


class VpcWiring(RoutedWiring):
    """Routed pods whose traffic leaves by the ENI that has their address."""

    def __init__(self, mode: VpcMode) -> None:
        super().__init__()
        self._mode = mode

    def attach(self, attachment: Attachment, netns_fd: int) -> Attachment:
        tables = [self._mode.pool.table_of(each.address) for each in attachment.addresses]
        table = next((table for table in tables if table), 0)
        return super().attach(msgspec.structs.replace(attachment, route_table=table), netns_fd)


class VpcMode:
    """What `--wiring vpc` adds to an agent. Settings come from the environment.

    Raises ConfigError, and Unsupported without boto3.
    """

    pool_name = POOL

    def __init__(self, options: Options, environment: Mapping[str, str] = os.environ) -> None:
        self._node_name = options.node_name
        self.settings = read_settings(environment)
        self._endpoint = environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or DEFAULT_ENDPOINT
        self._imds = Imds(self._endpoint)
        self._invoke = LateInvoke(environment.get("AWS_ENDPOINT_URL_EC2", ""))
        metrics = Metrics()
        self._links = EniLinks(
            mark=self.settings.connmark, diverted=self.settings.external_service_cidrs
        )
        self.manager: Manager[Key] = Manager(
            Ec2(self._invoke, metrics.observe_call),
            self._imds,
            self._links,
            self.settings,
            clock=boot_time,
            metrics=metrics,
        )
        self.wiring = VpcWiring(self)
        self._part = iptables.VpcPart() if options.datapath == "iptables" else nftables.VpcPart()
        self._uplink: link.Link | None = None
        self._store = Store()

    @property
    def mtu(self) -> int:
        """What is asked for, as far as the primary ENI's link carries it."""
        return min(self.settings.mtu, self._uplink.mtu if self._uplink else _OPTIMISTIC_MTU)

    def remember(self, state: State) -> None:
        """Take over what the state file holds. In the agent's loop, before `start`."""
        self._state = state
        loop = asyncio.get_running_loop()
        self.pool = VpcPool(self.manager, loop, restored_pool(state), WAIT_S)
        self.pool.restore(state.attachments(), state.resting())

    async def start(self, store: Store) -> None:
        """Returns when pods can be served; waits for the metadata service."""
        self._store = store
        self._follow_node()
        self._invoke.region = (await self.manager.identify()).region
        await self.manager.start()
        await self._keep()
        event(log, logging.INFO, "VPC mode", instance=self.manager.instance.id,
              type=self.manager.instance.type, enis=len(self.manager.store.enis))  # fmt: skip

    async def run(self) -> None:
        """Keep the rules, the node's settings and the introspection server, until cancelled."""
        runner = await self._serve_http()
        try:
            while True:
                await asyncio.sleep(KEEP_EVERY_S)
                self._follow_node()
                try:
                    await self._keep()
                except PodwireError as error:
                    event(log, logging.ERROR, "VPC mode cannot be kept up", error=error)
        finally:
            if runner is not None:
                await runner.cleanup()
            await self.manager.close()
            await self._imds.close()

    def watcher(self) -> Watcher:
        """Who puts back what somebody wipes of ENIs."""

        async def repair() -> list[str]:
            return await asyncio.to_thread(self._links.restore)

        return Watcher("vpc", self._links.concerns, repair)

    def serve(self, control: ControlServer) -> None:
        """Answer `podwire vpc` on the control socket."""
        control.route("/v1/vpc/pods", lambda _: introspection.pods(self.manager, self._pod_of))
        for path, answer in self._answers().items():
            control.route(path.replace("/v1/", "/v1/vpc/"), lambda _, answer=answer: answer())

    def _answers(self) -> dict[str, introspection.Answer]:
        return {
            "/v1/enis": lambda: introspection.enis(self.manager, self._pod_of, boot_time),
            "/v1/eni-configs": lambda: self._eni_config_name(self._own_node()),
            "/v1/networkutils-env-settings": lambda: introspection.network_settings(self.settings),
            "/v1/ipamd-env-settings": lambda: introspection.settings_in_force(self.settings),
        }

    async def _serve_http(self) -> web.AppRunner | None:
        """On localhost, where users of the AWS VPC CNI look."""
        if self.settings.disable_introspection:
            return None
        host, _, port = self.settings.introspection_bind_address.rpartition(":")
        runner = web.AppRunner(introspection.app(self._answers(), self.manager), access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, int(port)).start()
        except OSError as error:
            event(log, logging.ERROR, "no introspection server", error=error)
        return runner

    def _pod_of(self, key: Key) -> Pod:
        known = self._state.get(key)
        return known.pod if known is not None else Pod()

    # --- the node's object ------------------------------------------------------------------------

    def _own_node(self) -> objects.Node:
        return self._store.get(objects.Node, ("", self._node_name)) or objects.Node()

    def _follow_node(self) -> None:
        node = self._own_node()
        pods = node.status.capacity.get("pods", "")
        config = self._store.get(objects.ENIConfig, ("", self._eni_config_name(node)))
        self.manager.set_node(
            Node(
                max_pods=int(pods) if pods.isdigit() else 0,
                schedulable=not node.spec.unschedulable,
                terminating=leaving(node),
                eni_config_subnet=config.spec.subnet if config else "",
                eni_config_groups=tuple(config.spec.security_groups) if config else (),
            )
        )

    def _eni_config_name(self, node: objects.Node) -> str:
        """By annotation, then by label, then ``default``."""
        label = self.settings.eni_config_label
        meta = node.metadata
        return meta.annotations.get(label) or meta.labels.get(label) or "default"

    # --- the kernel -------------------------------------------------------------------------------

    async def _keep(self) -> None:
        """Rules and settings as the VPC is now; put back what somebody changed."""
        self.manager.instance = instance = await self.manager.identify()  # its groups may change
        await asyncio.to_thread(self._program, instance)

    def _program(self, instance: Instance) -> None:
        self._uplink = self._find_uplink(instance)
        if not self.settings.ipv6:
            sysctl.write({f"net.ipv4.conf.{sysctl.interface(self._uplink.name)}.rp_filter": 2})
            self._part.apply(self._table(instance, self._uplink.name))
        repairs = [*self._part.verify(), *self._links.restore()]
        for repair in repairs:
            event(log, logging.WARNING, "repaired", part="vpc", what=repair)

    def _table(self, instance: Instance, uplink: str) -> VpcTable:
        settings = self.settings
        return VpcTable(
            uplink=uplink,
            primary=instance.primary_address,
            near=(*instance.vpc_cidrs, *settings.exclude_snat_cidrs),
            snat=not settings.external_snat,
            random_ports=settings.random_ports,
            mark=settings.connmark,
        )

    def _find_uplink(self, instance: Instance) -> link.Link:
        mac = parse_mac(instance.primary_mac)
        with NetlinkSocket() as sock:
            for each in link.dump(sock):
                if each.mac == mac:
                    return each
        raise KernelError(f"no link has the primary ENI's MAC {instance.primary_mac}")
