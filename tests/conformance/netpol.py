"""NetworkPolicy cases: ``--suite netpol --datapath evaluator|nftables|iptables|ebpf``.

With ``--routing vxlan`` the pods of other nodes are behind the overlay; on eBPF, who sent a packet
is then what its tunnel id says.

`evaluator` asks the reference (`PolicyTable.judge`) and holds the compiled rule sets against it.
The data paths are asked with packets between namespaces, see `netpol_packets`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import yaml

from podwire.lab.api.server import ApiServer
from podwire.lab.api.status import StatusError
from podwire.policy import Packet, PolicyTable
from tests.conformance import CaseResult
from tests.conformance.netpol_world import Compilers, Malformed, Probe, World

Cell: TypeAlias = tuple[str, str]
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Backend(Protocol):
    """What answers the probes of one case."""

    def update(self) -> None:
        """Take over the world as it is now."""
        ...

    def connects(self, probes: Sequence[Probe]) -> list[dict[Cell, bool]]:
        """For each matrix and cell (source, destination), whether it connects."""
        ...

    def close(self) -> None: ...


def run(cases: Path, datapath: str, routing: str = "direct") -> Iterable[CaseResult]:
    """One result per case file under `cases`. `routing`: how nodes reach each other's pods."""
    if datapath == "evaluator":
        yield from _run(cases, Evaluator)
        return
    from tests.conformance.netpol_packets import DATAPATHS, Lab, PacketBackend

    if datapath not in DATAPATHS:
        raise SystemExit(f"no data path {datapath!r}: evaluator, {', '.join(DATAPATHS)}")
    lab = Lab(datapath, routing)
    try:
        yield from _run(cases, lambda world: PacketBackend(world, lab))
    finally:
        lab.close()


def _run(cases: Path, backend: Callable[[World], Backend]) -> Iterator[CaseResult]:
    for path in sorted([*cases.rglob("*.yaml"), *cases.rglob("*.yml")]):
        name = path.stem
        try:
            case = _load(path)
            name = str(case.get("id", path.stem))
            match case.get("kind"):
                case "reachability":
                    yield _reachability(name, case, backend)
                case "validation":
                    yield _validation(name, case)
                case "flow":
                    yield CaseResult(name, "skipped", "prose: tests/kernel/test_policy_flows.py")
                case "demo":
                    yield CaseResult(name, "skipped", "needs CiliumNetworkPolicy")
                case other:
                    yield CaseResult(name, "failed", f"unknown kind {other!r}")
        except Malformed as error:
            yield CaseResult(name, "failed", str(error))
        except KeyError as error:
            yield CaseResult(name, "failed", f"the case has no {error}")
        except Exception as error:
            yield CaseResult(name, "failed", f"{type(error).__name__}: {error}")


def _load(path: Path) -> dict[str, Any]:
    try:
        case = yaml.load(path.read_text(), Loader=_LOADER)
    except yaml.YAMLError as error:
        raise Malformed(f"not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(case, dict):
        raise Malformed("not a case")
    return case


def _reachability(name: str, case: dict[str, Any], make: Callable[[World], Backend]) -> CaseResult:
    world = World.of(case["topology"])
    backend = make(world)
    wrong: list[str] = []
    try:
        for number, step in enumerate(case["steps"]):
            for action in step.get("actions") or ():
                world.apply(action)
            backend.update()
            probes = world.probes(step, all_families=not _is_about_addresses(case))
            for probe, connected in zip(probes, backend.connects(probes), strict=True):
                wrong += _wrong(number, probe, connected)
    finally:
        backend.close()
    if wrong:
        shown = "\n".join(wrong[:12]) + (f"\n… {len(wrong)} in all" if len(wrong) > 12 else "")
        return CaseResult(name, "failed", shown)
    return CaseResult(name, "passed")


def _is_about_addresses(case: dict[str, Any]) -> bool:
    """A case with ipBlocks says what holds for the family of its blocks only."""
    text = str(case["steps"])
    return "ipBlock" in text or "networks" in text


def _wrong(step: int, probe: Probe, connected: dict[Cell, bool]) -> Iterator[str]:
    for source, destination, expected in probe.cells():
        got = connected.get((source, destination))
        if got is not None and got is not expected:
            family = "IPv4" if probe.bits == 32 else "IPv6"
            yield (
                f"step {step}: {source} → {destination} {probe.protocol.name}/{probe.port} "
                f"{family}: {'connects' if got else 'is blocked'}"
            )


class Evaluator:
    """The reference itself; every node's compiled rule sets must agree with it."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._compilers = Compilers(world)
        self._tables: dict[str, PolicyTable] = {}

    def update(self) -> None:
        self._tables = self._compilers.update()

    def connects(self, probes: Sequence[Probe]) -> list[dict[Cell, bool]]:
        return [self._matrix(probe) for probe in probes]

    def _matrix(self, probe: Probe) -> dict[Cell, bool]:
        out: dict[Cell, bool] = {}
        for source, destination, expected in probe.cells():
            targets = [(destination, probe.port)]
            if probe.via_service:
                targets = self._world.backends(destination, probe.port, probe.protocol)
            verdicts = {self._connects(probe, source, *target) for target in targets}
            if not verdicts:
                out[source, destination] = False
            elif None not in verdicts:
                # With several backends either answer is right where they differ.
                out[source, destination] = verdicts == {True} or (len(verdicts) > 1 and expected)
        return out

    def _connects(self, probe: Probe, source: str, destination: str, port: int) -> bool | None:
        from_, to = (self._world.address(end, probe.bits) for end in (source, destination))
        if from_ is None or to is None:
            return None
        packet = Packet(
            from_,
            to,
            probe.protocol,
            port,
            via_service=probe.via_service,
            source_node=source[5:] if source.startswith("node:") else None,
        )
        answers = {table.judge(packet).allowed for table in self._tables.values()}
        if len(answers) != 1:
            raise AssertionError(f"the nodes do not agree on {packet}")
        (allowed,) = answers
        compiled = self._compiled(packet, source, destination)
        if compiled is not allowed:
            raise AssertionError(f"rule sets say {compiled} to {packet}: {source} → {destination}")
        return allowed

    def _compiled(self, packet: Packet, source: str, destination: str) -> bool:
        if packet.source == packet.destination and not packet.via_service:
            return True
        verdicts: list[str] = []
        for end, peer, attribute in (
            (source, packet.destination, "egress"),
            (destination, packet.source, "ingress"),
        ):
            pod = self._world.pods.get(end)
            if pod is None or pod.get("hostNetwork"):
                continue
            node = pod["node"]
            own = source == f"node:{node}" or peer in map_addresses(self._world, node)
            if attribute == "ingress" and own:
                continue
            table = self._tables[node]
            endpoint = table.endpoints[pod["namespace"], pod["name"]]
            outcome = table.outcome(
                getattr(endpoint, attribute), peer, packet.protocol, packet.port
            )
            verdicts.append(outcome.verdict.value)
        return "deny" not in verdicts

    def close(self) -> None:
        pass


def map_addresses(world: World, node: str) -> list[bytes | None]:
    """A node's own addresses."""
    return [world.address(f"node:{node}", bits) for bits in (32, 128)]


def _validation(name: str, case: dict[str, Any]) -> CaseResult:
    """The object as it is written to the lab's API server, and the field that it names."""
    policy = case["policy"]
    registry = ApiServer().registry
    resource = registry.resource("Namespace", "v1")
    namespace = policy["metadata"].setdefault("namespace", "default")
    if namespace != "default":
        registry.create(resource, "", {"metadata": {"name": namespace}})
    resource = registry.resource(policy["kind"], policy["apiVersion"])
    expected = _judgement(case)
    try:
        registry.create(resource, namespace, policy)
    except StatusError as error:
        details = error.details or {}
        fields = [str(cause.get("field")) for cause in details.get("causes", ())]
        if expected == "accept":
            return CaseResult(name, "failed", f"rejected: {error}")
        if case.get("field") not in (None, *fields):
            return CaseResult(name, "failed", f"names {fields}, not {case['field']}")
        return CaseResult(name, "passed")
    if expected == "accept":
        return CaseResult(name, "passed")
    return CaseResult(name, "failed", "accepted")


def _judgement(case: dict[str, Any]) -> str:
    """`accept` or `reject`, also where it is so only of late or with a warning."""
    expected = str(case["expect"])
    for word in ("accept", "reject"):
        if expected == word or expected.startswith(f"{word}-"):
            return word
    raise Malformed(f"the runner does not know expect: {expected!r}")
