"""What KubeRay's operator refuses although its schema allows it: a resource that is applied and never becomes pods.

Written from what the operator checks before it acts (ray-project/kuberay 1.7,
ray-operator/controllers/ray/utils/validation.go), as far as it can concern a RayCluster or RayJob of cluster/kuberay.
Feature gates have their defaults.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

MAX_CLUSTER_NAME = 53  # a Service's name is its cluster's and a suffix of up to 10, and has 63 characters at most
MAX_JOB_NAME = MAX_CLUSTER_NAME - 6  # a job's cluster is called as the job, and six characters more
LEAST_RAY_WITH_TOKENS = (2, 52, 0)
IN_RAY_START_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")
DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # RFC 1035
LABEL_PART = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
LABEL_PREFIX = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")


def refusals(document: dict[str, Any]) -> list[str]:
    """Why the operator would refuse this RayCluster or RayJob: a sentence for each reason."""
    metadata, spec = document["metadata"], document["spec"]
    found = list(_name(metadata["name"], MAX_JOB_NAME if document["kind"] == "RayJob" else MAX_CLUSTER_NAME))
    if document["kind"] == "RayJob":
        found += _job(spec)
        cluster = spec.get("rayClusterSpec")
    else:
        cluster = spec
    if cluster is not None:
        found += _cluster(cluster, metadata.get("annotations", {}), of_a_job=document["kind"] == "RayJob")
    return found


def _name(name: str, longest: int) -> Iterator[str]:
    if len(name) > longest:
        yield f"the name has {len(name)} characters, of {longest}"
    if not DNS_LABEL.fullmatch(name):
        yield f"the name {name!r} is no DNS label"


def _cluster(spec: dict[str, Any], annotations: dict[str, str], *, of_a_job: bool) -> Iterator[str]:
    head, workers = spec["headGroupSpec"], spec.get("workerGroupSpecs", [])
    groups = {"head": head} | {worker["groupName"]: worker for worker in workers}
    for name, group in groups.items():
        yield from _group(name, group)
    if any(not group["template"]["spec"].get("containers") for group in groups.values()):
        return
    for worker in workers:
        yield from _worker(worker, autoscaling=spec.get("enableInTreeAutoscaling", False))
    yield from _fault_tolerance(spec, annotations)
    yield from _autoscaler(spec, groups)
    yield from _authentication(spec, of_a_job=of_a_job)
    for field in ("historyServerOptions", "networkPolicy", "tlsOptions"):
        if field in spec:
            yield f"{field} belongs to a feature gate that is shut"
    if of_a_job and spec.get("upgradeStrategy", {}).get("type"):
        yield "upgradeStrategy is for clusters that no job made"


def _group(name: str, group: dict[str, Any]) -> Iterator[str]:
    params = group.get("rayStartParams", {})
    if not group["template"]["spec"].get("containers"):
        yield f"{name} has no container"
    if group.get("resources") and any(params.get(key) for key in IN_RAY_START_PARAMS):
        yield f"{name} has resources both in rayStartParams and beside them"
    if "labels" in params:
        yield f"{name} has labels in rayStartParams"
    for key, value in group.get("labels", {}).items():
        prefix, slash, part = key.rpartition("/")
        if slash and not (len(prefix) <= 253 and LABEL_PREFIX.fullmatch(prefix)):
            yield f"{name} has a label whose key {key!r} is none"
        if not (len(part) <= 63 and LABEL_PART.fullmatch(part)):
            yield f"{name} has a label whose key {key!r} is none"
        if value and not (len(value) <= 63 and LABEL_PART.fullmatch(value)):
            yield f"{name} has a label whose value {value!r} is none"


def _worker(group: dict[str, Any], *, autoscaling: bool) -> Iterator[str]:
    name, least, most = group["groupName"], group.get("minReplicas"), group.get("maxReplicas")
    if not autoscaling and (least is None or most is None):
        yield f"{name} lacks minReplicas or maxReplicas"
    if (least or 0) < 0 or (most or 0) < 0 or (least is not None and most is not None and least > most):
        yield f"{name} has from {least} to {most} replicas"
    if group.get("suspend"):
        yield f"{name} is suspended, which is the operator's own affair"


def _environment(group: dict[str, Any]) -> dict[str, Any]:
    return {variable["name"]: variable for variable in group["template"]["spec"]["containers"][0].get("env", [])}


def _fault_tolerance(spec: dict[str, Any], annotations: dict[str, str]) -> Iterator[str]:
    head = spec["headGroupSpec"]
    params, environment = head.get("rayStartParams", {}), _environment(head)
    if "gcsFaultToleranceOptions" in spec:
        for variable in ("REDIS_PASSWORD", "RAY_REDIS_ADDRESS"):
            if variable in environment:
                yield f"{variable} is set beside gcsFaultToleranceOptions"
        if params.get("redis-password"):
            yield "redis-password is set beside gcsFaultToleranceOptions"
        for annotation in ("ray.io/ft-enabled", "ray.io/external-storage-namespace"):
            if annotations.get(annotation):
                yield f"the annotation {annotation} is set beside gcsFaultToleranceOptions"
    elif "RAY_REDIS_ADDRESS" in environment and annotations.get("ray.io/ft-enabled", "").lower() != "true":
        yield "RAY_REDIS_ADDRESS is set without gcsFaultToleranceOptions"
    if params.get("redis-username") or "REDIS_USERNAME" in environment:
        yield "Redis' user belongs into gcsFaultToleranceOptions"


def _autoscaler(spec: dict[str, Any], groups: dict[str, dict[str, Any]]) -> Iterator[str]:
    options, chosen = spec.get("autoscalerOptions", {}), _environment(groups["head"]).get("RAY_enable_autoscaler_v2")
    if options.get("idleTimeoutSeconds", 0) < 0:
        yield "autoscalerOptions.idleTimeoutSeconds is negative"
    if not spec.get("enableInTreeAutoscaling"):
        if chosen and chosen.get("value") in ("1", "true"):
            yield "RAY_enable_autoscaler_v2 is set and there is no autoscaler"
        return
    if chosen and "version" in options:
        yield "RAY_enable_autoscaler_v2 is set beside autoscalerOptions.version"
    if options.get("version") == "v2" or (chosen and chosen.get("value") in ("1", "true")):
        for name, group in groups.items():
            if group["template"]["spec"].get("restartPolicy", "Never") != "Never":
                yield f"{name} restarts its pods, which the autoscaler v2 does itself"


def _authentication(spec: dict[str, Any], *, of_a_job: bool) -> Iterator[str]:
    options = spec.get("authOptions", {"mode": "disabled"})
    token, kubernetes = options.get("mode", "token") == "token", options.get("enableK8sTokenAuth", False)
    if token:
        version = re.match(r"(\d+)\.(\d+)\.(\d+)", spec.get("rayVersion", ""))
        if version is None or tuple(int(number) for number in version.groups()) < LEAST_RAY_WITH_TOKENS:
            yield f"tokens take Ray 2.52.0 or later, and rayVersion is {spec.get('rayVersion')!r}"
    if kubernetes and (of_a_job or not token or options.get("secretName")):
        yield "Kubernetes' tokens are for a cluster that stays, with mode token and no secret"


def _job(spec: dict[str, Any]) -> Iterator[str]:
    selector, shutdown = spec.get("clusterSelector"), spec.get("shutdownAfterJobFinishes", False)
    mode, retries = spec.get("submissionMode", "K8sJobMode"), spec.get("backoffLimit", 0)
    if not selector and "rayClusterSpec" not in spec:
        yield "there is neither clusterSelector nor rayClusterSpec"
    if selector and not selector.get("ray.io/cluster"):
        yield "clusterSelector names no cluster"
    if spec.get("suspend") and (not shutdown or selector):
        yield "suspend wants shutdownAfterJobFinishes and a cluster of the job's own"
    if retries < 0 or spec.get("ttlSecondsAfterFinished", 0) < 0:
        yield "backoffLimit or ttlSecondsAfterFinished is negative"
    if spec.get("ttlSecondsAfterFinished") and not shutdown:
        yield "ttlSecondsAfterFinished wants shutdownAfterJobFinishes"
    if retries > 0 and (selector or mode == "InteractiveMode"):
        yield "backoffLimit wants a cluster of the job's own and a job that the operator submits"
    for deadline in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(deadline, 1) <= 0:
            yield f"{deadline} is not positive"
    if mode == "SidecarMode" and any(field in spec for field in ("submitterPodTemplate", "submitterConfig")):
        yield "SidecarMode has no submitter of its own"
    if mode == "SidecarMode" and selector:
        yield "SidecarMode wants a cluster of the job's own"
    if "deletionStrategy" in spec and shutdown and spec["deletionStrategy"].get("deletionRules"):
        yield "deletionRules and shutdownAfterJobFinishes exclude each other"
