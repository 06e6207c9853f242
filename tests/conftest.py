"""One Ray for the whole test session, started by the first test that asks for it."""

from __future__ import annotations

import secrets
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raygrpo.config import RunConfig

NUM_LOGICAL_CPUS = 4  # enough for every role of the largest test; Ray starts as many processes ahead of need

TINY_RUN: dict[str, Any] = {
    "name": "tiny",
    "num_steps": 1,
    "groups_per_step": 1,
    "model": {"path": "model"},
    "data": {"source": "rows.jsonl"},
    "reward": {"functions": [{"use": "exact_match"}]},
}


def run_config(**overrides: Any) -> RunConfig:
    """A valid configuration, with `section={...}` merged into its sections; the model and the data need not exist."""
    from raygrpo.section import merge

    return RunConfig.model_validate(merge(TINY_RUN, overrides))


@pytest.fixture(scope="session")
def ray_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The `ray` module, connected to an embedded Ray of this session alone. raygrpo.train uses it as it finds it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        # A local Ray would write a token to the home directory, which every later Ray of this user then has to use.
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("RAY_TRAIN_V2_ENABLED", "1")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        from raygrpo.connect import worker_environment

        repository = str(Path(__file__).parents[1])  # actors defined in tests are imported by workers
        ray.init(
            address="local",
            num_cpus=NUM_LOGICAL_CPUS,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": worker_environment(run_config()) | {"PYTHONPATH": repository}},
        )
        try:
            yield ray
        finally:
            ray.shutdown()


@pytest.fixture(scope="session")
def _gloo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import torch
    import torch.distributed as dist

    store = tmp_path_factory.mktemp("process_group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    torch.set_num_threads(1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Shells have commands that they start in the background ignore Ctrl-C, and so would this process and those that it
    starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def process_group(_gloo: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.distributed in this process for DeepSpeed: gloo, one rank. The group stays for the session (DeepSpeed
    cannot lose it); the variables do not, for others take them as a sign of a launcher."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need Ray run first: starting it forks this process, which later tests make too large for that."""
    items.sort(key=lambda item: "ray_session" not in getattr(item, "fixturenames", ()))
