"""A checkpoint exists whole or not at all, and the newest whole one is found, whatever happened to the others."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import pytest

from raygrpo import checkpoint as checkpoint_module
from raygrpo.checkpoint import MANIFEST, Checkpoint, CheckpointStore, RunState


def state(step: int, *, reward: float = math.nan) -> RunState:
    return RunState(
        step=step,
        attempt=2,
        num_learners=3,
        zero_stage=1,
        kl_coef=0.125,
        prompts_digest="abc",
        groups_per_step=4,
        seed=5,
        mean_reward=reward,
    )


def write(store: CheckpointStore, step: int, *, reward: float = math.nan) -> Checkpoint:
    partial = store.begin(step)
    (partial / "deepspeed").mkdir()
    (partial / "deepspeed" / "weights.pt").write_bytes(bytes([step]) * 1000)
    (partial / "deepspeed" / "optimizer.pt").write_bytes(bytes([step, 1]) * 1000)
    return store.commit(state(step, reward=reward))


def steps(store: CheckpointStore) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in store.root.iterdir() if not path.is_symlink())


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def test_what_is_written_is_found_again(store):
    assert store.newest() is None
    write(store, 10)
    write(store, 20, reward=0.5)
    newest = store.newest()
    assert newest is not None and newest.state == state(20, reward=0.5)
    assert (newest.directory / "deepspeed" / "weights.pt").read_bytes() == bytes([20]) * 1000


def test_older_ones_are_deleted_and_the_best_stay(tmp_path):
    store = CheckpointStore(tmp_path, keep=2, keep_best=1)
    rewards = {10: 0.1, 20: 0.9, 30: 0.3, 40: math.nan, 50: 0.5}
    seen = []
    for step, reward in rewards.items():
        write(store, step, reward=reward)
        seen.append(steps(store))
    assert seen == [[10], [10, 20], [10, 20, 30], [20, 30, 40], [20, 40, 50]]
    newest = store.newest()
    assert newest is not None and newest.state.step == 50, "the best is kept, but a run goes on from the newest"
    without_best = CheckpointStore(tmp_path, keep=2)
    write(without_best, 60, reward=0.0)
    assert steps(without_best) == [50, 60]


def test_scores_rank_instead_of_training_rewards_and_best_points_to_the_best(tmp_path):
    store = CheckpointStore(tmp_path, keep=1, keep_best=1)
    assert store.best is None
    scores: dict[int, float] = {}
    best = []
    for step, score in {10: 0.1, 20: 0.9, 30: 0.3, 40: 0.9, 50: 0.2}.items():
        partial = store.begin(step)
        (partial / "weights.pt").write_bytes(bytes([step]))
        store.commit(state(step, reward=-step), scores)
        scores[step] = score  # the evaluation comes after the checkpoint
        best.append(store.best and store.best.name)
    assert best == ["step-000010", "step-000010", "step-000020", "step-000020", "step-000040"]
    assert steps(store) == [40, 50]
    store.rank({50: 1.0})
    assert store.best == tmp_path / "step-000050"
    store.rank()
    assert store.best == tmp_path / "step-000040", "by the training reward"
    newest = store.newest()
    assert newest is not None and newest.state.step == 50, "a run goes on from the newest"


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "manifest cut", "no manifest", "other format"])
def test_a_damaged_one_is_passed_over_loudly(store, damage, caplog):
    write(store, 10)
    directory = write(store, 20).directory
    weights, manifest = directory / "deepspeed" / "weights.pt", directory / MANIFEST
    match damage:
        case "truncated":
            os.truncate(weights, 999)
        case "changed":
            content = bytearray(weights.read_bytes())
            content[500] ^= 1
            weights.write_bytes(content)
        case "missing":
            weights.unlink()
        case "manifest cut":
            os.truncate(manifest, manifest.stat().st_size // 2)
        case "no manifest":
            manifest.unlink()
        case "other format":
            manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    newest = store.newest()
    assert newest is not None and newest.state.step == 10
    assert "step-000020 is damaged and is passed over" in caplog.text
    if damage in ("truncated", "changed", "missing"):
        assert "deepspeed/weights.pt" in caplog.text


def test_one_that_was_being_written_does_not_exist(store):
    write(store, 10)
    partial = store.begin(20)
    (partial / "half").write_bytes(b"x")
    newest = store.newest()
    assert newest is not None and newest.state.step == 10
    write(store, 20)  # after the restart, over what is left
    newest = store.newest()
    assert newest is not None and newest.state.step == 20 and not (newest.directory / "half").exists()


def test_a_process_that_dies_at_any_point_of_a_commit_leaves_a_whole_newest_checkpoint(tmp_path, monkeypatch):
    """At every call to the operating system of a commit, in turn."""

    class Died(BaseException):
        pass

    calls = {"rename": os.rename, "fsync": os.fsync, "rmtree": shutil.rmtree}
    total = 0
    for fatal in range(100):
        store = CheckpointStore(tmp_path / str(fatal), keep=1)
        write(store, 10)
        count = 0

        def dying(name, fatal=fatal):
            def call(*args, **kwargs):
                nonlocal count
                if count == fatal:
                    raise Died
                count += 1
                return calls[name](*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint_module.os, "rename", dying("rename"))
            patch.setattr(checkpoint_module.os, "fsync", dying("fsync"))
            patch.setattr(checkpoint_module.shutil, "rmtree", dying("rmtree"))
            try:
                write(store, 20)
                finished = True
            except Died:
                finished = False
        newest = CheckpointStore(store.root, keep=1).newest()
        assert newest is not None and newest.state.step in (10, 20), fatal
        if finished:
            assert newest.state.step == 20
            total = fatal
            break
    assert total >= 6, "the test saw the calls it is about"


def test_the_same_step_can_be_written_again(store):
    write(store, 10)
    partial = store.begin(10)
    (partial / "weights").write_bytes(b"second")
    store.commit(dataclasses.replace(state(10), attempt=7))
    newest = store.newest()
    assert newest is not None and newest.state.attempt == 7
    assert (newest.directory / "weights").read_bytes() == b"second"


def test_what_was_given_up_leaves_nothing(store):
    store.begin(10)
    store.abandon(10)
    assert list(Path(store.root).iterdir()) == []
