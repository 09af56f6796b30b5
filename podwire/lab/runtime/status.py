"""Pod and node status as a kubelet reports it. Pure: the clock is a parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from podwire.lab.runtime.objects import Container, Pod

Json: TypeAlias = dict[str, Any]


@dataclass
class PodState:
    """What the runtime knows of one pod. `ready` holds the names of the ready containers."""

    phase: str = "Pending"
    addresses: Sequence[str] = ()
    host_addresses: Sequence[str] = ()
    container_id: str = ""
    started: str = ""  # when the kubelet took the pod up
    running: str = ""  # when its containers began
    finished: str = ""
    waiting: str = "ContainerCreating"
    message: str = ""
    ready: set[str] = field(default_factory=set[str])


def pod_status(pod: Pod, state: PodState, now: str) -> Json:
    """The whole status of a pod (core/v1 PodStatus)."""
    running = state.phase == "Running"
    names = {c.name for c in pod.containers}
    ready = running and names <= state.ready
    initialized = state.phase != "Pending"
    reason = {} if state.phase != "Succeeded" else {"reason": "PodCompleted"}
    why = reason or {"reason": "ContainersNotReady", "message": state.message or state.waiting}
    sidecars = {c.name for c in pod.spec.init_containers if c.restart_policy == "Always"}
    status: Json = {
        "phase": state.phase,
        "startTime": state.started,
        "qosClass": "BestEffort",
        "conditions": [
            _condition("PodReadyToStartContainers", running, now, {}),
            _condition("Initialized", initialized, now, reason),
            _condition("Ready", ready, now, {} if ready else why),
            _condition("ContainersReady", ready, now, {} if ready else why),
            _condition("PodScheduled", True, now, {}),
        ],
        "containerStatuses": [_container(c, state) for c in pod.spec.containers],
    }
    if pod.spec.init_containers:
        status["initContainerStatuses"] = [
            _container(c, state) if c.name in sidecars else _init_container(c, state)
            for c in pod.spec.init_containers
        ]
    if state.host_addresses:
        status["hostIP"] = state.host_addresses[0]
        status["hostIPs"] = [{"ip": ip} for ip in state.host_addresses]
    if state.addresses:
        status["podIP"] = state.addresses[0]
        status["podIPs"] = [{"ip": ip} for ip in state.addresses]
    return status


def _condition(kind: str, holds: bool, now: str, why: Mapping[str, str]) -> Json:
    status = "True" if holds else "False"
    return {"type": kind, "status": status, "lastTransitionTime": now, **why}


def _container(container: Container, state: PodState) -> Json:
    if state.phase == "Running":
        current: Json = {"running": {"startedAt": state.running}}
    elif state.phase == "Succeeded":
        current = {"terminated": _completed(state.running, state.finished)}
    else:
        current = {"waiting": {"reason": state.waiting, "message": state.message}}
    return {
        "name": container.name,
        "image": container.image,
        "imageID": "",
        "containerID": f"podwire://{state.container_id}" if state.phase != "Pending" else "",
        "ready": state.phase == "Running" and container.name in state.ready,
        "started": state.phase == "Running",
        "restartCount": 0,
        "state": current,
    }


def _init_container(container: Container, state: PodState) -> Json:
    """Init containers have nothing to do here: done as soon as the pod has its network."""
    done = state.phase != "Pending"
    current = (
        {"terminated": _completed(state.running, state.running)}
        if done
        else {"waiting": {"reason": "PodInitializing"}}
    )
    return {
        "name": container.name,
        "image": container.image,
        "imageID": "",
        "ready": done,
        "started": False,
        "restartCount": 0,
        "state": current,
    }


def _completed(began: str, ended: str) -> Json:
    return {"exitCode": 0, "reason": "Completed", "startedAt": began, "finishedAt": ended}


def node_ready(ready: bool, reason: str, message: str, now: str) -> Json:
    """The Ready condition of a node (a merge patch of its status)."""
    return {
        "conditions": [
            {
                "type": "Ready",
                "status": "True" if ready else "False",
                "reason": reason,
                "message": message,
                "lastHeartbeatTime": now,
                "lastTransitionTime": now,
            }
        ]
    }


def node_object(name: str, addresses: Sequence[str], pod_cidrs: Sequence[str]) -> Json:
    """A Node as the kubelet registers it, with the pod ranges that the lab gives it."""
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "labels": {
                "kubernetes.io/hostname": name,
                "kubernetes.io/os": "linux",
                "kubernetes.io/arch": "amd64",
            },
        },
        "spec": {"podCIDR": pod_cidrs[0], "podCIDRs": list(pod_cidrs)} if pod_cidrs else {},
        "status": {
            "addresses": [
                *({"type": "InternalIP", "address": address} for address in addresses),
                {"type": "Hostname", "address": name},
            ],
            "capacity": {"pods": "1000"},
            "allocatable": {"pods": "1000"},
        },
    }
