"""Checkpoints and the trained policy in MLflow's Models tab, and the policy in its registry.

A checkpoint is an external model: MLflow knows its path, digest and metrics, and whether it is still on disk; the
weights stay in the run's directory. Only a policy that is to be registered is copied into the store, so that whoever
finds it in the registry can download it. Models are named step-000050 and policy; one is found again by its run, name
and digest, so that delivering it twice does no harm.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raygrpo.tracking.journal import Item

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

ON_DISK_TAG = "raygrpo.on_disk"  # "true", or "false" once the checkpoint was deleted or written anew
MEAN_REWARD = "checkpoint/mean_reward"


TimedMetrics = dict[str, tuple[float, int]]  # metric -> value, unix time in ms at which it was logged


def checkpoint_item(step: int, path: str, digest: str, metrics: TimedMetrics, kept: list[int]) -> Item:
    """kept: the steps of the checkpoints that are on disk now."""
    name = f"step-{step:06d}"
    params = {"step": str(step), "path": path, "digest": digest}
    return {"kind": "checkpoint", "name": name, "step": step, "params": params, "metrics": metrics, "kept": kept}


def scores_item(step: int, metrics: TimedMetrics) -> Item:
    """What an evaluation found of the checkpoint of this step, if there is one."""
    return {"kind": "scores", "name": f"step-{step:06d}", "step": step, "metrics": metrics}


def policy_item(num_steps: int, path: str, register: str) -> Item:
    params = {"step": str(num_steps), "path": path}
    return {"kind": "policy", "name": "policy", "path": path, "params": params, "register": register}


def deliver_checkpoint(client: MlflowClient, experiment_id: str, run_id: str, item: Item) -> LoggedModel:
    """The checkpoint's model; those of checkpoints that are no longer there are marked."""
    models = _models(client, experiment_id, run_id)
    model = _same(models, item)
    if model is None:
        model = _create(client, experiment_id, run_id, item, "checkpoint")
        _upload_description(client, model)
    _link(client, run_id, model, item["step"])
    for other in models:
        step = int(other.params.get("step", -1))
        is_there = step in item["kept"] and (step != item["step"] or other.model_id == model.model_id)
        if other.model_type == "checkpoint" and other.tags.get(ON_DISK_TAG) != str(is_there).lower():
            client.set_logged_model_tags(other.model_id, {ON_DISK_TAG: str(is_there).lower()})
    return model


def find_checkpoint(client: MlflowClient, experiment_id: str, run_id: str, item: Item) -> LoggedModel | None:
    """The model of the checkpoint that is on disk, of the item's step."""
    models = _models(client, experiment_id, run_id)
    return next((m for m in models if m.name == item["name"] and m.tags.get(ON_DISK_TAG) == "true"), None)


def deliver_policy(client: MlflowClient, experiment_id: str, run_id: str, item: Item) -> None:
    """Copy the policy into the store and make it a version of the registered model `register`.

    Raises FileNotFoundError where the policy is not on this machine's disk."""
    if not Path(item["path"]).is_dir():
        raise FileNotFoundError(f"{item['path']} does not exist here: output_dir must be on storage that is shared")
    model = _same(_models(client, experiment_id, run_id), item)
    if model is None:
        model = _create(client, experiment_id, run_id, item, "policy")
    client.log_model_artifacts(model.model_id, item["path"])
    _upload_description(client, model)
    _link(client, run_id, model, int(item["params"]["step"]))
    _register(client, run_id, model, item["register"])


def _register(client: MlflowClient, run_id: str, model: LoggedModel, name: str) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = model.artifact_location  # models:/ID would be looked up in the process's store, not in this one
    versions = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    version = next((version for version in versions if version.source == source), None)
    if version is None:
        version = client.create_model_version(name, source, run_id, description=f"trained by run {run_id}")
    # The link from the model to its version, as mlflow.register_model leaves it.
    link = json.dumps([{"name": name, "version": version.version}])
    client.set_logged_model_tags(model.model_id, {MLFLOW_MODEL_VERSIONS: link})


def _models(client: MlflowClient, experiment_id: str, run_id: str) -> list[LoggedModel]:
    found: list[LoggedModel] = []
    token = None
    while True:
        page: Any = client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'", page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _same(models: list[LoggedModel], item: Item) -> LoggedModel | None:
    return next((m for m in models if m.name == item["name"] and m.params == item["params"]), None)


def _create(client: MlflowClient, experiment_id: str, run_id: str, item: Item, kind: str) -> LoggedModel:
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_IS_EXTERNAL

    tags = {ON_DISK_TAG: "true"} if kind == "checkpoint" else {}
    if not item.get("register"):
        tags[MLFLOW_MODEL_IS_EXTERNAL] = "true"
    return client.create_logged_model(experiment_id, item["name"], run_id, tags, item["params"], kind)


def _upload_description(client: MlflowClient, model: LoggedModel) -> None:
    """The file MLmodel, without which the registry takes no model; then the model is ready."""
    from mlflow.models.model import MLMODEL_FILE_NAME
    from mlflow.models.utils import get_external_mlflow_model_spec

    with tempfile.TemporaryDirectory() as directory:
        get_external_mlflow_model_spec(model).save(str(Path(directory, MLMODEL_FILE_NAME)))
        client.log_model_artifacts(model.model_id, directory)
    client.finalize_logged_model(model.model_id, "READY")


def _link(client: MlflowClient, run_id: str, model: LoggedModel, step: int) -> None:
    """Show the model on the run's page."""
    from mlflow.entities import LoggedModelOutput

    outputs = client.get_run(run_id).outputs
    if not outputs or all(output.model_id != model.model_id for output in outputs.model_outputs):
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
