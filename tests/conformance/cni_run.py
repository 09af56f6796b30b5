"""One case, run step by step on a fresh node."""

from __future__ import annotations

import json
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from podwire.wiring import Key
from tests.conformance import cni_actions as actions
from tests.conformance import cni_effects as effects
from tests.conformance.cni_case import Case, configuration, fill, name_of, placeholders
from tests.conformance.cni_judge import judge
from tests.conformance.cni_live import Live
from tests.conformance.cni_node import Namespace, Node
from tests.conformance.cni_uplinks import add_uplinks, two_uplinks

Done = subprocess.CompletedProcess[str]
ENI_STYLE = "aws-cni"
_BY_HAND = ("out0", "byhand0", "uplink0", "uplink1")


class Run:
    """A node, its pods, and what the case has seen so far."""

    def __init__(self, case: Case) -> None:
        self.case = case
        if case.plugin.startswith(ENI_STYLE):
            self.node = Node(made_by=two_uplinks)
            add_uplinks(self.node)
        else:
            self.node = Node(guarded=True)
        self.host = self.node.namespace
        self.pods: dict[str, Namespace] = {}
        self._outside: Namespace | None = None
        self.results: dict[str, Any] = {}
        self.saved: dict[tuple[str, str, str], Any] = {}
        self.addresses: list[str] = []
        self._owners: dict[str, Any] = {}
        self.last: Done | None = None
        self.restarted = False
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
            self.values[f"NETNS{number}_NAME" if number else "NETNS_NAME"] = pod.name
        self.host_links_before = self.host_links()

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
        actions.seed(self, [step for step in steps if step.get("reference_only")])
        for i, step in enumerate(steps):
            if step.get("reference_only"):
                if "remove" in step:
                    actions.forget(self, step["remove"])
                continue
            expect = step.get("expect")
            if "call" in step:
                refusals = [done.stdout.strip() for done in self._call(step) if done.returncode]
                if expect is None and (i < last or step.get("parallel")):
                    problems += [f"step {i + 1} failed: {each}" for each in refusals]
            else:
                self._other(step)
            if expect is not None:
                problems += self._judged(expect, i + 1, f"step {i + 1}: ")
        return problems + self._judged(self.case.document.get("expect") or {}, last + 1, "")

    def _judged(self, expect: dict[str, Any], step: int, prefix: str) -> list[str]:
        """Differences from `expect`, unless one of the alternatives holds."""
        found = judge(self, expect)
        if found:
            listed = self.case.document.get("alternatives") or []
            for each in listed if isinstance(listed, list) else [listed]:
                applies = each.get("step") in ((None, step) if not prefix else (step,))
                if applies and not judge(self, each.get("expect") or {}):
                    return []
        return [prefix + each for each in found]

    # --- steps ------------------------------------------------------------------------------------

    def _call(self, step: dict[str, Any]) -> list[Done]:
        self.prepare()
        plugin = name_of(step.get("plugin", self.case.plugin))
        count = step.get("parallel")
        if not count:
            answers = [self.one(step, plugin, "")]
        else:
            with ThreadPoolExecutor(count) as threads:
                runs = [threads.submit(self.one, step, plugin, str(n)) for n in range(count)]
                answers = [run.result() for run in runs]
        for done in answers:
            self.remember(step, done)
        return answers

    def one(self, step: dict[str, Any], plugin: str, number: str) -> Done:
        """Execute one call of a step."""
        values = {**self.all_values(), "PLUGIN": plugin, "N": number}
        config = fill(configuration(self.case, step), values)
        if "prev" in step:
            if step["prev"] not in self.results:
                raise ValueError(f"no result is kept as {step['prev']!r}")
            config["prevResult"] = self.results[step["prev"]]
        environment = {**(self.case.document.get("env") or {}), **(step.get("env") or {})}
        command = step["call"]
        if command is None:
            environment.pop("CNI_COMMAND", None)
        elif "CNI_COMMAND" not in (step.get("env") or {}):
            environment["CNI_COMMAND"] = command
        environment = {
            key: str(value) for key, value in fill(environment, values).items() if value is not None
        }
        self.config, self.environment = config, environment
        self._wire_by_hand(config)
        return self.run_plugin(plugin, environment, fill(step.get("stdin"), values), config)

    def run_plugin(
        self, plugin: str, environment: dict[str, str], stdin: Any, config: dict[str, Any]
    ) -> Done:
        """`stdin` is raw text, `closed`, `unreadable`, or None for the configuration."""
        if stdin == "unreadable":
            fd = os.open("/", os.O_RDONLY)
            try:
                return self.node.call(plugin, environment, fd)
            finally:
                os.close(fd)
        if stdin == "closed":
            return self.node.call(plugin, environment, subprocess.DEVNULL)
        if stdin is not None and not isinstance(stdin, str):
            stdin = json.dumps(stdin)
        return self.node.call(plugin, environment, json.dumps(config) if stdin is None else stdin)

    def remember(self, step: dict[str, Any], done: Done) -> None:
        self.last = done
        if done.returncode == 0 and done.stdout.strip():
            result = self.last_result()
            owner = None
            if not step.get("parallel"):
                owner = tuple(self.environment.get(f"CNI_{k}") for k in ("CONTAINERID", "IFNAME"))
            for each in _addresses(result):
                if owner is None or self._owners.get(each) != owner:  # not told once more
                    self.addresses.append(each)
                    self._owners[each] = owner
            if "as" in step:
                self.results[step["as"]] = result
        self.values.update(self._live_values())

    def last_result(self) -> dict[str, Any]:
        """Empty when the last call printed no result."""
        try:
            result = json.loads(self.last.stdout) if self.last else {}
        except ValueError:
            return {}
        return result if isinstance(result, dict) else {}

    def _other(self, step: dict[str, Any]) -> None:
        if "save" in step:
            where = fill(step["of"], self.all_values())
            what = step["save"]
            self.saved[what, where["ns"], where["link"]] = self.property_of(what, where)
        elif "runtime" in step:
            actions.runtime(self, step)
        elif "action" in step:
            actions.act(self, step["action"])
        elif "write" in step:
            path = Path(fill(step["write"], self.all_values()))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(fill(step.get("content", ""), self.all_values()))
            if path.parent == self.node.plugins:
                path.chmod(0o755)
        elif "remove" in step:
            Path(fill(step["remove"], self.all_values())).unlink(missing_ok=True)
        else:
            self._shell(step)

    def _shell(self, step: dict[str, Any]) -> None:
        places = {name.replace("NETNS", "pod"): pod for name, pod in self.pods.items()}
        for key, namespace in {"host": self.host, **places, "host_root": None}.items():
            if key not in step:
                continue
            command = fill(step[key], self.all_values())
            done = (namespace or self._root()).shell(command)
            if done.returncode:
                raise RuntimeError(f"{command}: {done.stderr.strip()}")
            for pod in self.pods.values():
                if pod.fd >= 0 and not Path(pod.path).exists():
                    self.delete_pod(pod)  # `ip netns del`: what we hold would keep it alive

    def delete_pod(self, pod: Namespace) -> None:
        """Returns when its links are gone: the kernel takes a namespace apart later."""
        look = Live(pod)
        peers = {each.get("link_index") for each in look.links if look.kind(each) == "veth"}
        pod.close()
        for _ in range(100):
            if not peers & {each["ifindex"] for each in Live(self.host).links}:
                return
            time.sleep(0.05)

    def _root(self) -> Namespace:
        """Outside node and pods, and not the machine's own network either."""
        self.pods.setdefault("ROOT", Namespace("root"))
        return self.pods["ROOT"]

    def prepare(self) -> None:
        """Start the daemon, once; a case may stop it again."""
        if not self._prepared:
            self.node.start()
            self._prepared = True

    # --- looking ----------------------------------------------------------------------------------

    def lives(self) -> dict[str, Live]:
        """One look at each namespace, by the names that cases use."""
        looks = {name.replace("NETNS", "pod"): Live(pod) for name, pod in self.pods.items()}
        if self._outside:
            looks["outside"] = Live(self._outside)
        return {"host": Live(self.host), **looks}

    def host_links(self) -> set[str]:
        look = Live(self.host)
        return {
            each["ifname"]
            for each in look.links
            if look.kind(each) != "bridge" and each["ifname"] not in _BY_HAND
        }

    def attachments(self) -> list[Key]:
        """The names of what is recorded."""
        state = self.node.state()
        try:
            return [known.key for known in state.attachments()]
        finally:
            state.close()

    def pod_ips(self) -> list[str]:
        previous = self.config.get("prevResult")
        stated = _addresses(previous) if isinstance(previous, dict) else []
        return list(dict.fromkeys(text.partition("/")[0] for text in [*self.addresses, *stated]))

    def pod_has(self, ip: str) -> bool:
        ifname = self.environment.get("CNI_IFNAME", "eth0")
        return any(each.partition("/")[0] == ip for each in Live(self.pod).addresses(ifname))

    def property_of(self, what: str, where: dict[str, str]) -> Any:
        look = self.lives()[where["ns"]]
        link = look.link(where["link"]) or {}
        return link.get({"mac": "address"}.get(what, what))

    def all_values(self) -> dict[str, str]:
        """Of all placeholders, as they are now."""
        return {**self.values, **self._live_values()}

    def _live_values(self) -> dict[str, str]:
        """Names that the plugin chose."""
        values: dict[str, str] = {}
        host = Live(self.host)
        ifname = self.environment.get("CNI_IFNAME", "eth0")
        inside = Live(self.pod).link(ifname)
        for each in host.links:
            if host.kind(each) == "ifb":
                values["IFB"] = each["ifname"]
            if host.kind(each) != "veth" or each["ifname"] in _BY_HAND:
                continue
            if inside is None or each.get("ifindex") == inside.get("link_index"):
                values["VETH"], values["HOST_VETH_MAC"] = each["ifname"], each["address"]
        if self.addresses:
            values["POD_IP"] = self.addresses[-1].partition("/")[0]
            values["ENI_TABLE"] = self.node.table_of(values["POD_IP"])
        return values

    def _wire_by_hand(self, config: dict[str, Any]) -> None:
        """portmap and firewall need the pod that their invented prevResult speaks of."""
        previous = config.get("prevResult")
        if name_of(self.case.plugin) not in ("podwire-portmap", "podwire-firewall"):
            return
        ifname = self.environment.get("CNI_IFNAME", "")
        positive = self.case.document.get("kind") == "positive"
        if isinstance(previous, dict) and positive and not Live(self.pod).link(ifname):
            effects.wire_by_hand(self.host, self.pod, ifname, previous)

    def latency(self, times: int) -> float:
        """Median seconds of ADD."""
        return actions.latency(self, times)


def _addresses(result: dict[str, Any]) -> list[str]:
    """Of a result of any version."""
    old = [result[key]["ip"] for key in ("ip4", "ip6") if key in result]
    return [*(each["address"] for each in result.get("ips") or []), *old]
