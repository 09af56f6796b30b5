"""One case, run step by step on a fresh node."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from podwire.ipam.pool import Cursor
from podwire.net import parse_address
from podwire.wiring import Attachment, Key, PodAddress
from tests.conformance import cni_effects as effects
from tests.conformance import cni_expect
from tests.conformance.cni_case import Case, configuration, fill, name_of, placeholders
from tests.conformance.cni_live import Live
from tests.conformance.cni_node import Namespace, Node

SETTLE_S = 3.0
Done = subprocess.CompletedProcess[str]


class Skip(Exception):
    """The case needs what this runner or machine lacks."""


class Run:
    """A node, its pods, and what the case has seen so far."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.node = Node(guarded=True)
        self.host = self.node.namespace
        self.pods: dict[str, Namespace] = {}
        self._outside: Namespace | None = None
        self.results: dict[str, Any] = {}
        self.saved: dict[tuple[str, str, str], Any] = {}
        self.addresses: list[str] = []
        self.last: Done | None = None
        self._prepared = False
        self.config: dict[str, Any] = {}
        self.environment: dict[str, str] = {}
        self.values = {
            **placeholders(case),
            "CNI_PATH": str(self.node.plugins),
            "HOST_NETNS": self.host.path,
            "DATADIR": str(self.node.folder / "data"),
        }
        for number in ("", "2", "3"):
            pod = Namespace(f"pod{number}")
            self.pods[f"NETNS{number}"] = pod
            self.values[f"NETNS{number}"] = pod.path
            if not number:
                self.values["NETNS_NAME"] = pod.name
        self.host_links_before = self._host_links()

    def close(self) -> None:
        self.node.close()
        for namespace in [*self.pods.values(), *([self._outside] if self._outside else [])]:
            namespace.close()

    @property
    def pod(self) -> Namespace:
        return self.pods["NETNS"]

    def outside(self) -> Namespace:
        if self._outside is None:
            self._outside = effects.connect_outside(self.host)
        return self._outside

    def execute(self) -> list[str]:
        """Everything that is not as the case expects."""
        problems: list[str] = []
        steps = self.case.steps
        last = max((i for i, step in enumerate(steps) if "call" in step), default=-1)
        self._seed([step for step in steps if step.get("reference_only")])
        for i, step in enumerate(steps):
            if step.get("reference_only"):
                if "remove" in step:
                    self._forget(step["remove"])
                continue
            expect = step.get("expect")
            if "call" in step:
                self._call(step)
                if expect is None and i < last and self.last and self.last.returncode:
                    problems.append(f"step {i + 1} failed: {self.last.stdout.strip()}")
            else:
                self._other(step)
            if expect is not None:
                found = self._judge(expect)
                if found and not self._alternative(i + 1):
                    problems += [f"step {i + 1}: {each}" for each in found]
        return problems + self._judge(self.case.document.get("expect", {}))

    # --- steps ------------------------------------------------------------------------------------

    def _call(self, step: dict[str, Any]) -> None:
        self._prepare()
        plugin = name_of(step.get("plugin", self.case.plugin))
        count = step.get("parallel")
        if count:
            with ThreadPoolExecutor(count) as threads:
                runs = [threads.submit(self._one, step, plugin, str(n)) for n in range(count)]
                for run in runs:
                    self._remember(step, run.result())
        else:
            self._remember(step, self._one(step, plugin, ""))

    def _one(self, step: dict[str, Any], plugin: str, number: str) -> Done:
        values = {**self.values, "PLUGIN": plugin, "N": number, **self._live_values()}
        config = fill(configuration(self.case, step), values)
        if "prev" in step:
            config["prevResult"] = self.results[step["prev"]]
        environment = {**self.case.document.get("env", {}), **step.get("env", {})}
        command = step["call"]
        if command is None:
            environment.pop("CNI_COMMAND", None)
        elif "CNI_COMMAND" not in step.get("env", {}):
            environment["CNI_COMMAND"] = command
        environment = {
            key: str(value) for key, value in fill(environment, values).items() if value is not None
        }
        self.config, self.environment = config, environment
        self._wire_by_hand(config)
        return self._execute(plugin, environment, step.get("stdin"), config)

    def _execute(
        self, plugin: str, environment: dict[str, str], stdin: str | None, config: dict[str, Any]
    ) -> Done:
        if stdin == "unreadable":
            fd = os.open("/", os.O_RDONLY)
            try:
                return self.node.call(plugin, environment, fd)
            finally:
                os.close(fd)
        if stdin == "closed":
            return self.node.call(plugin, environment, subprocess.DEVNULL)
        return self.node.call(plugin, environment, json.dumps(config) if stdin is None else stdin)

    def _remember(self, step: dict[str, Any], done: Done) -> None:
        self.last = done
        if done.returncode == 0 and done.stdout.strip():
            result = json.loads(done.stdout)
            self.addresses += [each["address"] for each in result.get("ips", [])]
            if "as" in step:
                self.results[step["as"]] = result
        self.values.update(self._live_values())

    def _other(self, step: dict[str, Any]) -> None:
        if "save" in step:
            where = fill(step["of"], self.values)
            what = step["save"]
            self.saved[what, where["ns"], where["link"]] = self._property(what, where)
        elif "runtime" in step:
            self._runtime(step["runtime"])
        elif "action" in step:
            self._action(step["action"])
        elif "write" in step:
            path = Path(fill(step["write"], self.values))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(fill(step.get("content", ""), self.values))
        elif "remove" in step:
            Path(fill(step["remove"], self.values)).unlink(missing_ok=True)
        else:
            for key, namespace in (("host", self.host), ("pod", self.pod), ("host_root", None)):
                if key in step:
                    command = fill(step[key], {**self.values, **self._live_values()})
                    if namespace is None:
                        raise Skip("the case works on the machine's own network")
                    done = namespace.shell(command)
                    if done.returncode:
                        raise RuntimeError(f"{command}: {done.stderr.strip()}")

    def _action(self, text: str) -> None:
        made = re.match(r"make ([\d,]+) allocations", text)
        if text == "stop the daemon":
            self._prepare()
            self.node.stop()
        elif made:
            self._prepare()
            self.values["EMPTY_MEDIAN"] = str(self._latency(10))
            self._fill_pool(int(made[1].replace(",", "")))
        elif text == "two pods on one bridge by bridge + firewall":
            self._two_pods()
        else:
            raise Skip(f"no means to: {text}")

    def _prepare(self) -> None:
        if not self._prepared:
            self.node.start()
            self._prepared = True

    # --- the starting point -----------------------------------------------------------------------

    def _seed(self, steps: list[dict[str, Any]]) -> None:
        """Leases and cursors that the reference keeps in files, as the project keeps them."""
        network = self.case.document.get("config", {}).get("name", "")
        cursors: list[Cursor] = []
        leases: dict[Key, list[PodAddress]] = {}
        for step in steps:
            name = str(step.get("write", "")).rpartition("/")[2]
            content = str(step.get("content", "")).strip()
            if name.startswith("last_reserved_ip."):
                last = parse_address(content)
                index = int(name.rpartition(".")[2])
                cursors.append(Cursor(network, index, len(last) * 8, int.from_bytes(last, "big")))
            elif name:
                owner, _, ifname = content.partition("\r\n")
                key = Key(network, owner, ifname.strip() or "eth0", name_of(self.case.plugin))
                leases.setdefault(key, []).append(PodAddress(parse_address(name), 24))
        state = self.node.state()
        for key, addresses in leases.items():
            state.add(Attachment(key=key, pool=network, addresses=tuple(addresses)), [], 0)
        if cursors:
            nobody = Attachment(key=Key(network, "nobody", "none"))
            state.add(nobody, cursors, 0)
            state.remove(nobody, 0)
        state.close()

    def _forget(self, path: str) -> None:
        """A lease file that the reference loses between two calls."""
        address = parse_address(path.rpartition("/")[2])
        state = self.node.state()
        for known in state.attachments():
            if any(each.address == address for each in known.addresses):
                state.remove(known, 0)
        state.close()

    def _fill_pool(self, count: int) -> None:
        self.node.stop()
        state = self.node.state()
        network = self.case.document["config"]["name"]
        subnet = self.case.document["reference_ipam"]["ranges"][0][0]["subnet"]
        first = int.from_bytes(parse_address(subnet.partition("/")[0]), "big") + 100
        with state.transaction():
            pass
        for number in range(count):
            address = PodAddress(
                (first + number).to_bytes(4, "big"), int(subnet.rpartition("/")[2])
            )
            key = Key(network, f"live{number}", "eth0", name_of(self.case.plugin))
            state.add(Attachment(key=key, pool=network, addresses=(address,)), [], 0)
        state.close()
        self.node.start()

    # --- judging ----------------------------------------------------------------------------------

    def _judge(self, expect: dict[str, Any]) -> list[str]:
        """Differences that remain; removals may take a moment."""
        deadline = time.monotonic() + (SETTLE_S if self._removed() else 0)
        while True:
            problems = list(self._differences(expect))
            if not problems or time.monotonic() >= deadline:
                return problems
            time.sleep(0.1)

    def _removed(self) -> bool:
        return self.environment.get("CNI_COMMAND") in ("DEL", "GC")

    def _differences(self, raw: dict[str, Any]) -> Iterator[str]:
        expect = fill(raw, {**self.values, **self._live_values()})
        if self.last:
            previous = self.config.get("prevResult")
            yield from cni_expect.output(expect, self.last, previous)
        yield from cni_expect.state(expect, {"host": Live(self.host), "pod": Live(self.pod)})
        yield from self._rules(expect.get("rules"))
        for probe in expect.get("probes", []):
            yield from self._probe(probe)
        for what, where in expect.get("same", {}).items():
            if self._property(what, where) != self.saved[what, where["ns"], where["link"]]:
                yield f"the {what} of {where['link']} has changed"
        if expect.get("no_residue"):
            yield from self._residue()
        if "leases" in expect:
            found = sorted(f"{k.container}/{k.ifname}" for k in self._keys())
            if found != sorted(expect["leases"]):
                yield f"leases are {found}, not {expect['leases']}"
        for key in ("distinct_addresses", "distinct_leases"):
            if expect.get(key) and len(set(self.addresses)) != len(self.addresses):
                yield f"an address was given twice: {sorted(self.addresses)}"
        if "latency" in expect:
            full, empty = self._latency(20), float(self.values["EMPTY_MEDIAN"])
            if full > 2 * empty:
                yield f"ADD takes {full * 1e3:.1f} ms, {empty * 1e3:.1f} ms with an empty store"

    def _alternative(self, number: int) -> bool:
        return any(
            each.get("step") == number and not self._judge(each.get("expect", {}))
            for each in self.case.document.get("alternatives", [])
        )

    def _rules(self, rules: dict[str, Any] | None) -> Iterator[str]:
        if not rules:
            return
        present = any("contains" in each for each in rules.values())
        ips = self._pod_ips()
        if not present:
            yield from effects.mentions(Live(self.host), ips, living=bool(self._keys()))
        plain = [ip for ip in ips if self._pod_has(ip)]
        if "portMappings" in self.config.get("runtimeConfig", {}):
            yield from effects.host_ports(
                self.config, present, self.host, self.pod, self.outside(), plain
            )
        if self.config.get("ipMasq") and present:
            self.outside()
            yield from effects.masquerade(self.pod, self.outside(), plain, True)
        if self.config.get("macspoofchk") and present:
            ifname = self.environment["CNI_IFNAME"]
            bridge = self.config.get("bridge", "cni0")
            if effects.spoofed_frame_passes(self.host, self.pod, ifname, bridge):
                yield "a frame with another source MAC leaves the pod"
        if name_of(self.case.plugin) == "podwire-firewall":
            for ip in plain:
                yield from effects.forwarding(self.host, self.pod, self.outside(), ip, present)

    def _probe(self, probe: dict[str, Any]) -> Iterator[str]:
        expected = probe.get("exit", 0) == 0
        if "ping" in probe:
            source = self.host if probe["ns"] == "host" else self.pod
            works = source.shell(f"ping -c 1 -W 1 {probe['ping']}").returncode == 0
        else:
            names = {"pod": self.pod, "pod2": self.pods["NETNS2"], "host": self.host}
            target = {"outside": effects.OUTSIDE4}.get(probe["to"])
            if target is None:
                look = Live(names[probe["to"]])
                target = look.addresses(self.environment["CNI_IFNAME"])[0].partition("/")[0]
            works = names[probe["from"]].shell(f"ping -c 1 -W 1 {target}").returncode == 0
        if works != expected:
            yield f"probe {probe} {'works' if works else 'does not work'}"

    def _residue(self) -> Iterator[str]:
        extra = self._host_links() - self.host_links_before
        if extra:
            yield f"links are left: {sorted(extra)}"
        container = self.environment.get("CNI_CONTAINERID")
        if any(key.container == container for key in self._keys()):
            yield f"a lease of {container} is left"
        yield from effects.mentions(Live(self.host), self._pod_ips(), living=bool(self._keys()))

    # --- looking ----------------------------------------------------------------------------------

    def _host_links(self) -> set[str]:
        look = Live(self.host)
        ours = ("out0", "byhand0")
        return {
            each["ifname"]
            for each in look.links
            if look.kind(each) != "bridge" and each["ifname"] not in ours
        }

    def _keys(self) -> list[Key]:
        state = self.node.state()
        try:
            return [known.key for known in state.attachments()]
        finally:
            state.close()

    def _pod_ips(self) -> list[str]:
        previous = self.config.get("prevResult", {}).get("ips", [])
        texts = [*self.addresses, *(each["address"] for each in previous)]
        return list(dict.fromkeys(text.partition("/")[0] for text in texts))

    def _pod_has(self, ip: str) -> bool:
        ifname = self.environment.get("CNI_IFNAME", "eth0")
        return any(each.partition("/")[0] == ip for each in Live(self.pod).addresses(ifname))

    def _property(self, what: str, where: dict[str, str]) -> Any:
        namespace = self.host if where["ns"] == "host" else self.pod
        link = Live(namespace).link(where["link"]) or {}
        return link.get({"mac": "address"}.get(what, what))

    def _live_values(self) -> dict[str, str]:
        """Names that the plugin chose."""
        values: dict[str, str] = {}
        host = Live(self.host)
        ifname = self.environment.get("CNI_IFNAME", "eth0")
        inside = Live(self.pod).link(ifname)
        for each in host.links:
            if host.kind(each) == "ifb":
                values["IFB"] = each["ifname"]
            if host.kind(each) != "veth" or each["ifname"] == "out0":
                continue
            if inside is None or each.get("ifindex") == inside.get("link_index"):
                values["VETH"] = each["ifname"]
        return values

    # --- larger means -----------------------------------------------------------------------------

    def _wire_by_hand(self, config: dict[str, Any]) -> None:
        """portmap and firewall need the pod that their invented prevResult speaks of."""
        previous = config.get("prevResult")
        if name_of(self.case.plugin) not in ("podwire-portmap", "podwire-firewall"):
            return
        ifname = self.environment.get("CNI_IFNAME", "")
        positive = self.case.document.get("kind") == "positive"
        if previous and positive and not Live(self.pod).link(ifname):
            effects.wire_by_hand(self.host, self.pod, ifname, previous)

    def _latency(self, times: int) -> float:
        """Median seconds of ADD."""
        samples: list[float] = []
        plugin = name_of(self.case.plugin)
        for number in range(times):
            step = {"call": "ADD", "env": {"CNI_CONTAINERID": f"timed{number}"}}
            self._one({**step, "call": "DEL"}, plugin, "")  # makes configuration and environment
            environment, config = self.environment | {"CNI_COMMAND": "ADD"}, self.config
            started = time.perf_counter()
            self._execute(plugin, environment, None, config)
            samples.append(time.perf_counter() - started)
            self._one({**step, "call": "DEL"}, plugin, "")
        return statistics.median(samples)

    def _runtime(self, verb: str) -> None:
        """What a runtime library does with a list: ADD in order, DEL in reverse."""
        self._prepare()
        document = self.case.document
        everything = fill(document["config"], self.values)
        version, name = everything.get("cniVersion", self.case.version), everything["name"]
        plugins = everything["plugins"]
        command = verb.upper()
        if command == "ADD":
            self.results.pop("list", None)
        for plugin in reversed(plugins) if command == "DEL" else plugins:
            kind = plugin["type"].replace("${PLUGIN}", "bridge")
            config = {**plugin, "type": name_of(kind), "name": name, "cniVersion": version}
            if plugin is plugins[0]:
                config["ipam"] = configuration(self.case, {})["ipam"]
            if "list" in self.results:
                config["prevResult"] = self.results["list"]
            environment = {**fill(document["env"], self.values), "CNI_COMMAND": command}
            self.config, self.environment = config, environment
            done = self._execute(name_of(kind), environment, None, config)
            self._remember({"as": "list"} if command == "ADD" else {}, done)
            if done.returncode:
                raise RuntimeError(f"{command} of {kind}: {done.stdout}")

    def _two_pods(self) -> None:
        """Two pods on one bridge, each through bridge and then firewall."""
        self._prepare()
        self.outside()
        config = fill(self.case.document["config"], self.values)
        for number in ("", "2"):
            environment = {
                **fill(self.case.document["env"], self.values),
                "CNI_COMMAND": "ADD",
                "CNI_CONTAINERID": f"pod{number}",
                "CNI_NETNS": self.values[f"NETNS{number}"],
            }
            bridge = {
                "cniVersion": self.case.version,
                "name": config["name"],
                "type": "podwire",
                "bridge": "bridge0",
                "isDefaultGateway": True,
                "ipMasq": True,
                "ipam": {"ranges": [[{"subnet": "10.1.2.0/24"}]]},
            }
            self.environment = environment
            done = self._execute("podwire", environment, None, bridge)
            self._remember({"as": "pod"}, done)
            chained = {**config, "type": "podwire-firewall", "prevResult": self.results["pod"]}
            self._remember({}, self._execute("podwire-firewall", environment, None, chained))
