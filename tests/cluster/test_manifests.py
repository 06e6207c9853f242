"""The Kubernetes manifests, rendered by kustomize: schemas, references between them, and that pods hold the run.

Rendering takes `kubectl` (or `kustomize`); without either these tests are skipped. No cluster is asked: Kubernetes' own
kinds are held against the schemas that the package kubernetes-validate ships, Ray's against kuberay_v1.7.json.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.cluster.fit import Nodes, check_fit, run_of
from tests.cluster.shapes import CLUSTER, SIZES

KUBERNETES = "1.34"
GPU_BYTES = {"1.5b": 44.7 * 2**30, "8b": 80 * 2**30, "32b": 80 * 2**30}  # of the GPUs that the runs' first lines name
UNITS = {"m": 1e-3, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
SCHEMA = json.loads(Path(__file__).with_name("kuberay_v1.7.json").read_text())
RENDER = next(
    (command for program, command in (("kubectl", ["kubectl", "kustomize"]), ("kustomize", ["kustomize", "build"]))
     if shutil.which(program)), None
)  # fmt: skip
needs_kustomize = pytest.mark.skipif(RENDER is None, reason="neither kubectl nor kustomize is here to render with")
pytestmark = needs_kustomize
EVERYTHING = [f"{kind}/{size}" for kind in ("overlays", "jobs") for size in SIZES]


@cache
def render(name: str) -> list[dict[str, Any]]:
    assert RENDER is not None
    result = subprocess.run([*RENDER, CLUSTER / "kuberay" / name], capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(result.stdout))


def ray_resource(name: str) -> dict[str, Any]:
    [found] = [document for document in render(name) if document["apiVersion"] == "ray.io/v1"]
    return found


def cluster_spec(name: str) -> dict[str, Any]:
    found = ray_resource(name)
    return found["spec"]["rayClusterSpec"] if found["kind"] == "RayJob" else found["spec"]


def groups(name: str) -> dict[str, dict[str, Any]]:
    spec = cluster_spec(name)
    return {"head": spec["headGroupSpec"]} | {group["groupName"]: group for group in spec["workerGroupSpecs"]}


def pod_specs(document: Any) -> Iterator[dict[str, Any]]:
    if isinstance(document, dict):
        if "containers" in document:
            yield document
        for value in document.values():
            yield from pod_specs(value)
    elif isinstance(document, list):
        for value in document:
            yield from pod_specs(value)


def values_of(document: Any, key: str) -> Iterator[Any]:
    if isinstance(document, dict):
        if key in document:
            yield document[key]
        for value in document.values():
            yield from values_of(value, key)
    elif isinstance(document, list):
        for value in document:
            yield from values_of(value, key)


def quantity(text: str) -> float:
    unit = text.lstrip("0123456789.")
    return float(text.removesuffix(unit)) * UNITS.get(unit, 1)


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_document_fits_its_schema(name):
    for document in render(name):
        if document["apiVersion"] == "ray.io/v1":
            jsonschema.validate(document, SCHEMA)
        else:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
    for group in groups(name).values():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_the_schemas_refuse_what_is_misspelt():
    cluster = json.loads(json.dumps(ray_resource("overlays/8b")))
    cluster["spec"]["enableInTreeAutoscaler"] = True
    with pytest.raises(jsonschema.ValidationError, match="enableInTreeAutoscaler"):
        jsonschema.validate(cluster, SCHEMA)
    service = next(document for document in render("overlays/8b") if document["kind"] == "Service")
    with pytest.raises(kubernetes_validate.ValidationError, match="selektor"):
        misspelt = service | {"spec": service["spec"] | {"selektor": {}}}
        kubernetes_validate.validate(misspelt, KUBERNETES, strict=True)


@pytest.mark.parametrize("size", SIZES)
def test_pods_hold_the_run_that_they_are_for(size):
    types = {}
    for role, group in groups(f"overlays/{size}").items():
        [container] = group["template"]["spec"]["containers"]
        assert {"name": "runs", "mountPath": run_of(size).output_dir} in container["volumeMounts"], "on every node"
        resources = container["resources"]
        assert "cpu" in resources["limits"] or role == "head", "KubeRay tells Ray a pod's CPUs from its limits"
        cpus = group["rayStartParams"].get("num-cpus", resources["requests"]["cpu"])
        types[role] = Nodes(
            labels=group["labels"],
            num_cpus=quantity(cpus),
            num_gpus=quantity(resources["limits"].get("nvidia.com/gpu", "0")),
            host_bytes=quantity(resources["limits"]["memory"]),
            gpu_bytes=GPU_BYTES[size],
            least=group.get("minReplicas", 1),
            most=group.get("maxReplicas", 1),
        )
    check_fit(size, types)


@pytest.mark.parametrize("size", SIZES)
def test_a_job_has_the_cluster_of_its_overlay_and_trains_its_run(size):
    job = ray_resource(f"jobs/{size}")
    assert job["kind"] == "RayJob"
    assert job["spec"]["rayClusterSpec"] == ray_resource(f"overlays/{size}")["spec"]
    assert job["spec"]["backoffLimit"] > 0 and job["spec"]["shutdownAfterJobFinishes"]
    assert job["spec"]["entrypoint"].split() == ["bash", "/opt/raygrpo/cluster/run_or_resume.sh", size, "first"]
    assert (CLUSTER / "runs" / f"{size}.yaml").exists()


@pytest.mark.parametrize("name", EVERYTHING)
def test_ray_is_shut_to_the_world(name):
    spec = cluster_spec(name)
    assert spec["authOptions"] == {"mode": "token", "secretName": "raygrpo-ray-token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert not spec["headGroupSpec"].get("enableIngress", False)
    kinds = [document["kind"] for document in render(name)]
    assert "Ingress" not in kinds and "Secret" not in kinds, "no way in, and no secret in the repository"
    services = [document for document in render(name) if document["kind"] == "Service"]
    assert {service["spec"].get("type", "ClusterIP") for service in services} == {"ClusterIP"}
    [policy] = [document for document in render(name) if document["kind"] == "NetworkPolicy"]
    assert policy["spec"]["podSelector"] == {}, "all pods"
    inside, operator, monitoring = policy["spec"]["ingress"]
    assert inside == {"from": [{"podSelector": {}}]}
    assert operator["ports"] == [{"port": 8265}]
    assert monitoring["from"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
    assert monitoring["ports"] == [{"port": 8080}]


@pytest.mark.parametrize("name", EVERYTHING)
def test_secrets_services_and_claims_that_are_named_exist(name):
    documents = render(name)
    made = (CLUSTER / "kuberay" / "make_secrets.sh").read_text()
    references = [*values_of(documents, "secretKeyRef")]
    assert references
    for reference in references:
        [line] = [line for line in made.splitlines() if line.startswith(f"secret {reference['name']} ")]
        assert f'"{reference["key"]}=' in line
    assert f'secret {cluster_spec(name)["authOptions"]["secretName"]} "auth_token=' in made
    services = {document["metadata"]["name"] for document in documents if document["kind"] == "Service"}
    urls = [value for value in values_of(documents, "value") if str(value).startswith("http://")]
    assert {url.removeprefix("http://").partition(":")[0] for url in urls} <= services
    assert cluster_spec(name)["gcsFaultToleranceOptions"]["redisAddress"].partition(":")[0] in services
    claims = {document["metadata"]["name"] for document in documents if document["kind"] == "PersistentVolumeClaim"}
    assert {claim["claimName"] for claim in values_of(documents, "persistentVolumeClaim")} == claims


MONITOR_FIELDS = {"selector", "namespaceSelector", "podMetricsEndpoints", "jobLabel", "podTargetLabels", "sampleLimit"}
ENDPOINT_FIELDS = {"port", "path", "scheme", "interval", "scrapeTimeout", "relabelings", "metricRelabelings"}


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_prometheus_operator_finds_the_metrics_of_every_ray_pod(name, tmp_path):
    """With the component, as its comment says to add it. The base does without a kind that may be unknown."""
    assert "PodMonitor" not in {document["kind"] for document in render(name)}
    for group in groups(name).values():
        ports = {port["name"]: port["containerPort"] for port in group["template"]["spec"]["containers"][0]["ports"]}
        assert ports["metrics"] == 8080
    directory = CLUSTER / "kuberay"
    paths = {key: os.path.relpath(directory / path, tmp_path) for key, path in (("of", name), ("add", "monitoring"))}
    (tmp_path / "kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
        f"resources: [{paths['of']}]\ncomponents: [{paths['add']}]\n"
    )
    with_monitor = render(str(tmp_path))
    [monitor] = [document for document in with_monitor if document["kind"] == "PodMonitor"]
    assert [document for document in with_monitor if document is not monitor] == render(name)
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert monitor["metadata"]["namespace"] == "raygrpo" and set(monitor["spec"]) <= MONITOR_FIELDS
    [pods] = monitor["spec"]["selector"]["matchExpressions"]
    assert pods == {"key": "ray.io/node-type", "operator": "In", "values": ["head", "worker"]}
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    assert set(endpoint) <= ENDPOINT_FIELDS and endpoint["port"] == "metrics"


def test_versions_are_those_of_the_project(name="overlays/8b"):
    import tomllib

    project = tomllib.loads((CLUSTER.parent / "pyproject.toml").read_text())["project"]
    pins = dict(requirement.split("==") for requirement in project["dependencies"] if "==" in requirement)
    assert cluster_spec(name)["rayVersion"] == pins["ray[default,train,data]"]
    images = {container["image"] for spec in pod_specs(render(name)) for container in spec["containers"]}
    ours = {image for image in images if image.startswith("raygrpo")}
    assert ours == {f"raygrpo-{kind}:{project['version']}" for kind in ("cpu", "gpu")}
    assert all(":" in image and not image.endswith(":latest") for image in images)


@pytest.mark.parametrize("name", EVERYTHING)
def test_the_autoscaler_is_version_2_and_pods_do_not_come_back_as_other_nodes(name):
    spec = cluster_spec(name)
    assert spec["enableInTreeAutoscaling"] and spec["autoscalerOptions"]["version"] == "v2"
    assert 300 <= spec["autoscalerOptions"]["idleTimeoutSeconds"] <= 3600
    assert {group["template"]["spec"]["restartPolicy"] for group in groups(name).values()} == {"Never"}
