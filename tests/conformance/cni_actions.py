"""What cases describe in words, and how the starting points of the reference are reached."""

from __future__ import annotations

import json
import re
import statistics
import time
from typing import TYPE_CHECKING, Any

from podwire.ipam.pool import Cursor
from podwire.net import parse_address
from podwire.wiring import Attachment, Key, PodAddress
from tests.conformance.cni_case import configuration, fill, name_of

if TYPE_CHECKING:
    from tests.conformance.cni_run import Run


class Skip(Exception):
    """The case needs what this runner or machine lacks."""


def act(run: Run, text: str) -> None:
    """One sentence of prose; several are separated by `;`, `,` or "and". Raises Skip."""
    if re.search(r"two pods on (one|two|different) bridges?.* firewall", text):
        _two_pods(run, one_bridge="one bridge" in text)
        return
    made = re.match(r"make ([\d,]+) allocations", text)
    if made:
        run.prepare()
        run.values["EMPTY_MEDIAN"] = str(latency(run, 10))
        _fill_pool(run, int(made[1].replace(",", "")))
        return
    for part in re.split(r"[;,]\s*|\s+(?:and|then)\s+", text):
        _act(run, part.strip().lower())


def _act(run: Run, text: str) -> None:
    waited = re.search(r"wait (?:for )?([\d.]+) ?(?:s|sec|seconds)\b", text)
    if waited:
        # The rest of a freed address is counted on the daemon's clock; other waits are real.
        if run.node.running:
            run.node.skip_time(float(waited[1]))
        return
    if re.search(r"\b(namespace|netns)\b", text) and re.search(r"\b(delete|remove)", text):
        run.delete_pod(run.pod)
        return
    if not re.search(r"\b(daemon|agent|server|it)\b", text):
        raise Skip(f"no means to: {text}")
    words = set(re.findall(r"[a-z]+", text))
    if words & {"kill", "killed", "crash"}:
        run.prepare()
        run.node.kill()
    elif words & {"stop", "stopped", "restart", "restarted"}:
        run.prepare()
        run.node.stop()
    if words & {"start", "started", "again", "restart", "restarted", "back"}:
        run.restarted = True
        run.node.start()
    elif not run.node.running:
        return
    elif not words & {"kill", "killed", "crash", "stop", "stopped"}:
        raise Skip(f"no means to: {text}")


# --- the reference's files ------------------------------------------------------------------------


def seed(run: Run, steps: list[dict[str, Any]]) -> None:
    """Leases and cursors that the reference keeps in files, as the project keeps them."""
    network = (run.case.document.get("config") or {}).get("name", "")
    plugin = name_of(run.case.plugin)
    cursors: list[Cursor] = []
    leases: dict[Key, list[PodAddress]] = {}
    for step in steps:
        name = str(step.get("write", "")).rpartition("/")[2]
        content = str(step.get("content", "")).strip()
        if name.startswith("last_reserved_ip."):
            last = parse_address(content)
            index = int(name.rpartition(".")[2])
            cursors.append(Cursor(network, index, len(last) * 8, int.from_bytes(last, "big")))
        elif name and name != "lock":
            owner, _, ifname = content.partition("\n")
            key = Key(network, owner.strip(), ifname.strip() or "eth0", plugin)
            leases.setdefault(key, []).append(PodAddress(parse_address(name), 24))
    state = run.node.state()
    for key, addresses in leases.items():
        state.add(Attachment(key=key, pool=network, addresses=tuple(addresses)), [], 0)
    if cursors:
        nobody = Attachment(key=Key(network, "nobody", "none"))
        state.add(nobody, cursors, 0)
        state.remove(nobody, 0)
    state.close()


def forget(run: Run, path: str) -> None:
    """A lease file that the reference loses between two calls."""
    address = parse_address(path.rpartition("/")[2])
    state = run.node.state()
    for known in state.attachments():
        if any(each.address == address for each in known.addresses):
            state.remove(known, 0)
    state.close()


# --- many addresses -------------------------------------------------------------------------------


def _fill_pool(run: Run, count: int) -> None:
    run.node.stop()
    state = run.node.state()
    network = run.case.document["config"]["name"]
    subnet = run.case.document["reference_ipam"]["ranges"][0][0]["subnet"]
    first = int.from_bytes(parse_address(subnet.partition("/")[0]), "big") + 100
    length = int(subnet.rpartition("/")[2])
    for number in range(count):
        address = PodAddress((first + number).to_bytes(4, "big"), length)
        key = Key(network, f"live{number}", "eth0", name_of(run.case.plugin))
        state.add(Attachment(key=key, pool=network, addresses=(address,)), [], 0)
    state.close()
    run.node.start()


def latency(run: Run, times: int) -> float:
    """Median seconds of ADD."""
    samples: list[float] = []
    plugin = name_of(run.case.plugin)
    for number in range(times):
        step = {"call": "ADD", "env": {"CNI_CONTAINERID": f"timed{number}"}}
        run.one({**step, "call": "DEL"}, plugin, "")  # makes configuration and environment
        environment, config = run.environment | {"CNI_COMMAND": "ADD"}, run.config
        started = time.perf_counter()
        run.run_plugin(plugin, environment, None, config)
        samples.append(time.perf_counter() - started)
        run.one({**step, "call": "DEL"}, plugin, "")
    return statistics.median(samples)


# --- larger means ---------------------------------------------------------------------------------


def runtime(run: Run, step: dict[str, Any]) -> None:
    """What a runtime library does with a list: ADD in order, DEL in reverse, results kept."""
    run.prepare()
    command = str(step["runtime"]).upper()
    config = fill({**run.case.document["config"], **(step.get("config") or {})}, run.values)
    plugins = config.get("plugins") or [config]
    if command == "ADD":
        run.results.pop("list", None)
    if command == "CHECK" and config.get("disableCheck"):
        return
    environment = {**run.case.document.get("env", {}), **(step.get("env") or {})}
    environment = {**fill(environment, run.values), "CNI_COMMAND": command}
    capabilities = json.loads(environment.pop("CAP_ARGS", "") or "{}")
    run.environment = environment
    for plugin in reversed(plugins) if command == "DEL" else plugins:
        kind = plugin["type"].replace("${PLUGIN}", "bridge")
        made = _plugin_config(run, config, plugin, first=plugin is plugins[0])
        offered = {k: v for k, v in capabilities.items() if plugin.get("capabilities", {}).get(k)}
        if offered:
            made["runtimeConfig"] = {**made.get("runtimeConfig", {}), **offered}
        run.config = made
        done = run.run_plugin(name_of(kind), environment, None, made)
        run.remember({"as": "list"} if command == "ADD" else {}, done)
        if done.returncode and "expect" not in step:
            raise RuntimeError(f"{command} of {kind}: {done.stdout}")
        if done.returncode:
            return
    if command == "DEL":
        run.results.pop("list", None)


def _plugin_config(
    run: Run, everything: dict[str, Any], plugin: dict[str, Any], *, first: bool
) -> dict[str, Any]:
    version = everything.get("cniVersion", run.case.version)
    kind = plugin["type"].replace("${PLUGIN}", "bridge")
    made = {**plugin, "type": name_of(kind), "name": everything["name"], "cniVersion": version}
    ipam = configuration(run.case, {}).get("ipam")
    if first and ipam is not None:
        made["ipam"] = fill(ipam, run.values)
    for key in ("cni.dev/valid-attachments", "cni.dev/attachments"):
        if key in everything:
            made[key] = everything[key]
    if "list" in run.results:
        made["prevResult"] = run.results["list"]
    return made


def _two_pods(run: Run, *, one_bridge: bool) -> None:
    """Two pods, each through bridge and then firewall."""
    run.prepare()
    run.outside()
    config = fill(run.case.document["config"], run.values)
    for number in ("", "2"):
        other = 0 if one_bridge or not number else 1
        environment = {
            **fill(run.case.document["env"], run.values),
            "CNI_COMMAND": "ADD",
            "CNI_CONTAINERID": f"pod{number}",
            "CNI_NETNS": run.values[f"NETNS{number}"],
        }
        bridge = {
            "cniVersion": run.case.version,
            "name": f"{config['name']}{other or ''}",
            "type": "podwire",
            "bridge": f"bridge{other}",
            "isDefaultGateway": True,
            "ipMasq": True,
            "ipam": {"ranges": [[{"subnet": f"10.1.{2 + other}.0/24"}]]},
        }
        run.environment = environment
        done = run.run_plugin("podwire", environment, None, bridge)
        run.remember({"as": f"pod{number}"}, done)
        previous = {"prevResult": run.results[f"pod{number}"]}
        chained = {**config, "type": "podwire-firewall", **previous}
        run.config = chained
        run.remember({}, run.run_plugin("podwire-firewall", environment, None, chained))
