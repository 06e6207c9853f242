"""The rules of KubeRay's operator: each finds what it is for, and what they are for is not in the manifests."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.cluster.operator_rules import refusals
from tests.cluster.test_manifests import EVERYTHING, needs_kustomize, ray_resource


def container(**fields: Any) -> dict[str, Any]:
    return {"spec": {"containers": [{"name": "ray", "image": "ray"} | fields]}}


CLUSTER: dict[str, Any] = {
    "kind": "RayCluster",
    "metadata": {"name": "small"},
    "spec": {
        "rayVersion": "2.60.0",
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {"version": "v2"},
        "gcsFaultToleranceOptions": {"redisAddress": "valkey:6379"},
        "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "labels": {"role": "head"}, "template": container()},
        "workerGroupSpecs": [
            {"groupName": "worker", "minReplicas": 0, "maxReplicas": 2, "rayStartParams": {}, "template": container()}
        ],
    },
}
JOB: dict[str, Any] = {
    "kind": "RayJob",
    "metadata": {"name": "small"},
    "spec": {"entrypoint": "true", "shutdownAfterJobFinishes": True, "rayClusterSpec": CLUSTER["spec"]},
}


@needs_kustomize
@pytest.mark.parametrize("name", EVERYTHING)
def test_the_operator_takes_every_manifest(name):
    assert refusals(ray_resource(name)) == []


def test_what_the_cases_below_start_from_is_taken():
    assert refusals(CLUSTER) == refusals(JOB) == []


def set_in(document: dict[str, Any], path: str, value: Any) -> None:
    """path: keys and list positions, with dots; a value of None takes the last away."""
    *inner, last = path.split("/")
    place: Any = document
    for key in inner:
        place = place[int(key)] if isinstance(place, list) else place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value


HEAD, WORKER = "spec/headGroupSpec", "spec/workerGroupSpecs/0"
ENVIRONMENT = f"{HEAD}/template/spec/containers/0/env"
OF_CLUSTERS: list[tuple[dict[str, Any], str]] = [
    ({"metadata/name": "a" * 54}, "54 characters, of 53"),
    ({"metadata/name": "8b"}, "no DNS label"),
    ({"metadata/name": "qwen-1.5b"}, "no DNS label"),
    ({f"{HEAD}/template": {"spec": {"containers": []}}}, "head has no container"),
    ({f"{HEAD}/resources": {"CPU": "0"}}, "head has resources both"),
    ({f"{WORKER}/resources": {"CPU": "4"}, f"{WORKER}/rayStartParams": {"num-gpus": "1"}}, "worker has resources both"),
    ({f"{WORKER}/rayStartParams": {"labels": "role=worker"}}, "worker has labels in rayStartParams"),
    ({f"{HEAD}/labels": {"role": "the head"}}, "value 'the head'"),
    ({f"{HEAD}/labels": {"a role": "head"}}, "key 'a role'"),
    ({f"{HEAD}/labels": {"Example.com/role": "head"}}, "key 'Example.com/role'"),
    ({f"{WORKER}/minReplicas": 3}, "from 3 to 2 replicas"),
    ({f"{WORKER}/minReplicas": None, "spec/enableInTreeAutoscaling": False}, "lacks minReplicas"),
    ({f"{WORKER}/suspend": True}, "worker is suspended"),
    ({ENVIRONMENT: [{"name": "REDIS_PASSWORD", "value": "x"}]}, "REDIS_PASSWORD is set beside"),
    ({ENVIRONMENT: [{"name": "RAY_REDIS_ADDRESS", "value": "x"}]}, "RAY_REDIS_ADDRESS is set beside"),
    (
        {ENVIRONMENT: [{"name": "RAY_REDIS_ADDRESS", "value": "x"}], "spec/gcsFaultToleranceOptions": None},
        "without gcsFaultToleranceOptions",
    ),
    ({f"{HEAD}/rayStartParams/redis-password": "x"}, "redis-password is set beside"),
    ({f"{HEAD}/rayStartParams/redis-username": "x"}, "Redis' user belongs"),
    ({"metadata/annotations": {"ray.io/ft-enabled": "true"}}, "annotation ray.io/ft-enabled"),
    ({ENVIRONMENT: [{"name": "RAY_enable_autoscaler_v2", "value": "1"}]}, "beside autoscalerOptions.version"),
    (
        {ENVIRONMENT: [{"name": "RAY_enable_autoscaler_v2", "value": "1"}], "spec/enableInTreeAutoscaling": False},
        "there is no autoscaler",
    ),
    ({f"{HEAD}/template/spec/restartPolicy": "Always"}, "head restarts its pods"),
    ({f"{WORKER}/template/spec/restartPolicy": "OnFailure"}, "worker restarts its pods"),
    ({"spec/autoscalerOptions/idleTimeoutSeconds": -1}, "idleTimeoutSeconds is negative"),
    ({"spec/rayVersion": None}, "rayVersion is None"),
    ({"spec/rayVersion": "2.51.1"}, "rayVersion is '2.51.1'"),
    ({"spec/authOptions": {}, "spec/rayVersion": "2.9.0"}, "rayVersion is '2.9.0'"),
    ({"spec/authOptions/enableK8sTokenAuth": True, "spec/authOptions/secretName": "x"}, "Kubernetes' tokens"),
    ({"spec/networkPolicy": {}}, "feature gate"),
]
OF_JOBS: list[tuple[dict[str, Any], str]] = [
    ({"metadata/name": "a" * 48}, "48 characters, of 47"),
    ({"spec/rayClusterSpec": None}, "neither clusterSelector nor rayClusterSpec"),
    ({"spec/clusterSelector": {"app": "ray"}}, "names no cluster"),
    ({"spec/suspend": True, "spec/shutdownAfterJobFinishes": False}, "suspend wants"),
    ({"spec/backoffLimit": -1}, "is negative"),
    ({"spec/ttlSecondsAfterFinished": -1}, "is negative"),
    ({"spec/ttlSecondsAfterFinished": 60, "spec/shutdownAfterJobFinishes": False}, "ttlSecondsAfterFinished wants"),
    ({"spec/backoffLimit": 1, "spec/submissionMode": "InteractiveMode"}, "backoffLimit wants"),
    ({"spec/backoffLimit": 1, "spec/clusterSelector": {"ray.io/cluster": "small"}}, "backoffLimit wants"),
    ({"spec/activeDeadlineSeconds": 0}, "activeDeadlineSeconds is not positive"),
    ({"spec/submissionMode": "SidecarMode", "spec/submitterPodTemplate": {}}, "SidecarMode has no submitter"),
    ({"spec/submissionMode": "SidecarMode", "spec/clusterSelector": {"ray.io/cluster": "small"}}, "SidecarMode wants"),
    ({"spec/rayClusterSpec/upgradeStrategy": {"type": "Recreate"}}, "upgradeStrategy"),
    ({"spec/rayClusterSpec/authOptions/enableK8sTokenAuth": True}, "Kubernetes' tokens"),
    ({"spec/rayClusterSpec/headGroupSpec/rayStartParams/labels": "a=b"}, "head has labels in rayStartParams"),
    ({"spec/deletionStrategy": {"deletionRules": [{}]}}, "exclude each other"),
]


@pytest.mark.parametrize(
    ("document", "changes", "reason"),
    [(CLUSTER, *case) for case in OF_CLUSTERS] + [(JOB, *case) for case in OF_JOBS],
)
def test_the_operator_refuses(document, changes, reason):
    changed = copy.deepcopy(document)
    for path, value in changes.items():
        set_in(changed, path, value)
    assert [sentence for sentence in refusals(changed) if reason in sentence], refusals(changed)
    assert len(refusals(changed)) == 1
