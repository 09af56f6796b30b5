from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podwire.lab.api.status import StatusError
from podwire.lab.controllers.cron import next_time
from podwire.lab.controllers.replicas import roll

from .cluster import Cluster, image, workload


def test_a_deployment_becomes_pods_spread_over_the_nodes():
    cluster = Cluster()
    cluster.create("Deployment", workload(replicas=4))
    cluster.run()
    nodes = [pod["spec"]["nodeName"] for pod in cluster.all("Pod")]
    assert sorted(nodes) == ["node-1"] * 2 + ["node-2"] * 2
    status = cluster.get("Deployment", "web")["status"]
    assert (status["replicas"], status["readyReplicas"], status["updatedReplicas"]) == (4, 4, 4)
    assert {c["type"]: c["status"] for c in status["conditions"]} == {
        "Available": "True",
        "Progressing": "True",
    }
    (pod, *_) = cluster.all("Pod")
    assert pod["metadata"]["name"].startswith("web-")
    assert pod["metadata"]["labels"]["pod-template-hash"] in pod["metadata"]["name"]


def test_a_rolling_update_never_goes_below_what_is_promised():
    cluster = Cluster()
    cluster.create("Deployment", workload(replicas=4))
    cluster.run()
    cluster.patch("Deployment", "web", image("web:2"))
    for _ in range(100):
        pods = [p for p in cluster.all("Pod") if "deletionTimestamp" not in p["metadata"]]
        ready = [p for p in pods if p["status"]["phase"] == "Running"]
        assert len(pods) <= 5, "maxSurge 25 % of 4"
        assert len(ready) >= 3, "maxUnavailable 25 % of 4"
        cluster.run(limit=1)
    assert {p["spec"]["containers"][0]["image"] for p in cluster.all("Pod")} == {"web:2"}
    assert len(cluster.all("Pod")) == 4
    revision = cluster.get("Deployment", "web")["metadata"]["annotations"]
    assert revision["deployment.kubernetes.io/revision"] == "2"


def test_a_rollback_takes_the_old_replica_set_again():
    cluster = Cluster()
    cluster.create("Deployment", workload())
    cluster.run()
    first = cluster.names("ReplicaSet")
    cluster.patch("Deployment", "web", image("web:2"))
    cluster.run()
    cluster.patch("Deployment", "web", image("web:1"))
    cluster.run()
    assert len(cluster.names("ReplicaSet")) == 2
    assert {p["metadata"]["ownerReferences"][0]["name"] for p in cluster.all("Pod")} == {first[0]}
    annotations = cluster.get("ReplicaSet", first[0])["metadata"]["annotations"]
    assert annotations["deployment.kubernetes.io/revision"] == "3"


def test_recreate_waits_until_the_old_pods_are_gone():
    cluster = Cluster()
    cluster.create("Deployment", workload(replicas=2, strategy={"type": "Recreate"}))
    cluster.run()
    cluster.patch("Deployment", "web", image("web:2"))
    assert all("deletionTimestamp" in p["metadata"] for p in cluster.all("Pod"))
    cluster.run(limit=1)
    assert len(cluster.all("Pod")) == 1
    cluster.run()
    assert {p["spec"]["containers"][0]["image"] for p in cluster.all("Pod")} == {"web:2"}


def test_scaling_down_spares_the_ready_pods():
    cluster = Cluster()
    cluster.create("Deployment", workload(replicas=3))
    cluster.run(limit=2)
    cluster.patch("Deployment", "web", {"spec": {"replicas": 2}})
    cluster.run()
    assert [p["status"]["phase"] for p in cluster.all("Pod")] == ["Running"] * 2


def test_deleting_a_deployment_takes_everything_below_with_it():
    cluster = Cluster()
    cluster.create("Deployment", workload())
    cluster.run()
    cluster.delete("Deployment", "web")
    cluster.run()
    assert not cluster.all("ReplicaSet")
    assert not cluster.all("Pod")


def test_orphans_stay_and_are_adopted_again():
    cluster = Cluster()
    cluster.create("Deployment", workload())
    cluster.run()
    (name,) = cluster.names("ReplicaSet")
    pods = cluster.names("Pod")
    cluster.delete("Deployment", "web", propagation="Orphan")
    assert cluster.names("ReplicaSet") == [name]
    cluster.delete("ReplicaSet", name, propagation="Orphan")
    assert cluster.names("Pod") == pods
    assert not any(p["metadata"]["ownerReferences"] for p in cluster.all("Pod"))
    cluster.create("ReplicaSet", workload())
    assert cluster.names("Pod") == pods
    assert all(p["metadata"]["ownerReferences"] for p in cluster.all("Pod"))


def test_foreground_deletion_removes_the_owner_last():
    cluster = Cluster()
    cluster.create("ReplicaSet", workload(replicas=1))
    cluster.run()
    cluster.delete("ReplicaSet", "web", propagation="Foreground")
    assert cluster.names("ReplicaSet") == ["web"], "its pod still runs"
    cluster.run()
    assert not cluster.names("ReplicaSet")


def test_a_stateful_set_is_ordered():
    cluster = Cluster()
    cluster.create("StatefulSet", workload("db", replicas=3, serviceName="db"))
    assert cluster.names("Pod") == ["db-0"]
    cluster.run(limit=1)
    assert cluster.names("Pod") == ["db-0", "db-1"]
    cluster.run()
    assert cluster.names("Pod") == ["db-0", "db-1", "db-2"]
    spec = cluster.get("Pod", "db-1")["spec"]
    assert (spec["hostname"], spec["subdomain"]) == ("db-1", "db")
    cluster.patch("StatefulSet", "db", image("web:2"))
    going = [
        p["metadata"]["name"] for p in cluster.all("Pod") if "deletionTimestamp" in p["metadata"]
    ]
    assert going == ["db-2"]
    cluster.run()
    assert {p["spec"]["containers"][0]["image"] for p in cluster.all("Pod")} == {"web:2"}
    cluster.patch("StatefulSet", "db", {"spec": {"replicas": 1}})
    cluster.run()
    assert cluster.names("Pod") == ["db-0"]
    assert cluster.get("StatefulSet", "db")["status"]["readyReplicas"] == 1


def test_a_daemon_set_follows_the_nodes():
    cluster = Cluster()
    daemon = workload("agent", replicas=None)
    daemon["spec"]["template"]["spec"]["nodeSelector"] = {"topology.kubernetes.io/zone": "a"}
    cluster.create("DaemonSet", daemon)
    cluster.node("node-3", zone="a", ready=False)  # daemons run there all the same
    cluster.run()
    assert sorted(p["spec"]["nodeName"] for p in cluster.all("Pod")) == ["node-1", "node-3"]
    cluster.delete("Node", "node-3")
    assert [p["spec"]["nodeName"] for p in cluster.all("Pod")] == ["node-1"]
    status = cluster.get("DaemonSet", "agent")["status"]
    assert (status["desiredNumberScheduled"], status["numberReady"]) == (1, 1)


def test_a_job_runs_until_enough_have_succeeded():
    cluster = Cluster()
    job = workload("sum", replicas=None, completions=3, parallelism=2)
    del job["spec"]["selector"]
    job["spec"]["template"]["spec"]["restartPolicy"] = "Never"
    cluster.create("Job", job)
    for _ in range(3):
        cluster.run()
        running = [p for p in cluster.all("Pod") if p["status"]["phase"] == "Running"]
        assert len(running) <= 2
        cluster.status("default", running[0]["metadata"]["name"], phase="Succeeded")
        cluster.settle()
    status = cluster.get("Job", "sum")["status"]
    assert status["succeeded"] == 3
    assert [c["type"] for c in status["conditions"]] == ["Complete"]


def test_a_cron_job_runs_at_its_time():
    cluster = Cluster()
    template = workload("tick", replicas=None)["spec"]["template"]
    template["spec"]["restartPolicy"] = "Never"
    spec = {"schedule": "*/5 * * * *", "jobTemplate": {"spec": {"template": template}}}
    cluster.create("CronJob", {"metadata": {"name": "tick"}, "spec": spec})
    assert not cluster.all("Job")
    cluster.time += timedelta(minutes=5)
    cluster.patch("CronJob", "tick", {"metadata": {"labels": {"a": "b"}}})  # stands for the timer
    assert len(cluster.all("Job")) == 1
    cluster.run()
    assert len(cluster.all("Pod")) == 1


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("* * * * *", (1, 1, 12, 1)),
        ("30 4 * * *", (1, 2, 4, 30)),
        ("0 0 1 * *", (2, 1, 0, 0)),
        ("15,45 */6 * * *", (1, 1, 12, 15)),
        ("0 12 * * mon-wed", (1, 5, 12, 0)),
        ("0 9 13 * 5", (1, 2, 9, 0)),  # the 13th or a Friday
        ("@yearly", (1, 1, 0, 0)),
    ],
)
def test_next_time(schedule, expected):
    found = next_time(schedule, datetime(2026, 1, 1, 12, 0, 20, tzinfo=UTC))
    assert found
    assert (found.month, found.day, found.hour, found.minute) == expected


@pytest.mark.parametrize("schedule", ["", "* * * *", "60 * * * *", "x * * * *", "0 0 31 2 *"])
def test_a_schedule_that_never_comes(schedule):
    assert next_time(schedule, datetime(2026, 1, 1, tzinfo=UTC)) is None


counts = st.integers(0, 6)


@given(wanted=st.integers(1, 8), surge=st.integers(0, 3), away=st.integers(0, 3), new=counts,
       new_ready=counts, old=counts, old_ready=counts)  # fmt: skip
def test_every_step_of_a_roll_keeps_the_promises(
    wanted, surge, away, new, new_ready, old, old_ready
):
    new_ready, old_ready = min(new, new_ready), min(old, old_ready)
    if not surge and not away:
        away = 1
    rolling = {"maxSurge": surge, "maxUnavailable": away}
    grown, shrunk = roll(wanted, rolling, (new, new_ready), [(old, old_ready)])
    assert grown <= wanted
    assert 0 <= shrunk <= old
    assert grown <= new or grown + old <= wanted + surge
    serving = min(new_ready, grown) + min(old_ready, shrunk)
    assert serving >= min(new_ready + old_ready, wanted - away) or new > wanted


def test_the_namespace_takes_all_with_it():
    cluster = Cluster()
    cluster.create("Namespace", {"metadata": {"name": "shop"}})
    assert cluster.names("ServiceAccount", "shop") == ["default"]
    cluster.create("Deployment", workload(), "shop")
    cluster.run()
    cluster.delete("Namespace", "shop")
    assert cluster.get("Namespace", "shop")["status"]["phase"] == "Terminating"
    with pytest.raises(StatusError, match="being terminated"):
        cluster.create("Deployment", workload("late"), "shop")
    cluster.run()
    with pytest.raises(StatusError, match="not found"):
        cluster.get("Namespace", "shop")
    assert not cluster.all("Pod", "shop")
