"""The benchmark compares equal things: every method gives the same log-probabilities, and memory is counted right."""

import json

import pytest
import torch

from raygrpo.bench import gpu_ladder, shared_prefix
from raygrpo.bench.forward_methods import METHODS
from raygrpo.bench.memory import PeakMemory, saved_bytes

pytest.importorskip("prefix_grouper")


def test_all_methods_compute_the_same():
    model = shared_prefix.tiny_qwen3()
    point = shared_prefix.Point(20, 8, 3)
    measured = shared_prefix.measure(model, point, list(METHODS), stream_tokens=100, max_steps=1)
    assert measured.num_groups == 2
    assert max(measured.logprob_difference.values()) < 1e-4
    assert max(measured.gradient_difference.values()) < 1e-4
    assert measured.saved["shared"] < measured.saved["prefix-grouper"] < measured.saved["packed"]
    assert measured.peak["shared"] < measured.peak["packed"]
    assert measured.speedup["shared"] == 1.0


def test_the_command_prints_marks_and_goes_on_after_the_points_that_its_file_holds(capsys, tmp_path, monkeypatch):
    first, second = shared_prefix.Point(16, 4, 2), shared_prefix.Point(8, 4, 2)
    kept = tmp_path / "points.jsonl"
    monkeypatch.setattr(shared_prefix, "QUICK", [first])
    shared_prefix.main(quick=True, resume=kept)
    assert "U: median" in capsys.readouterr().out
    [before] = [json.loads(line)["measurement"] for line in kept.read_text().splitlines()]
    assert before["point"] == {"prompt": 16, "completion": 4, "group_size": 2}
    monkeypatch.setattr(shared_prefix, "QUICK", [first, second])
    shared_prefix.main(quick=True, json=True, resume=kept)
    after = json.loads(capsys.readouterr().out)["grid"]
    assert after[0] == before, "with its times"
    assert after[1]["point"]["prompt"] == 8
    assert len(kept.read_text().splitlines()) == 2


def test_saved_bytes_counts_each_storage_once_and_no_parameter():
    weight, x = torch.nn.Parameter(torch.ones(3, 3)), torch.ones(5, 3, requires_grad=True)
    _, saved = saved_bytes(lambda: ((x @ weight) * x).sum() + (x @ weight).sum(), [weight])
    assert saved == 2 * x.nbytes  # x, and one of the two products


def test_peak_memory_follows_what_lives():
    with PeakMemory() as memory:
        a = torch.zeros(1000)
        b = a + 1
        del b
        c = a.view(10, 100) * 2
        del a, c
        torch.zeros(500)
    assert memory.peak == 8000


def test_the_ladder_runs_on_any_device():
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8}
    rows = gpu_ladder.run(device="cpu", shapes={"tiny": shape | {"vocab_size": 50, "head_dim": 8}})
    assert "tiny" in gpu_ladder.ladder_table(rows)
    assert [row["method"] for row in rows] == ["shared", "packed"]
    assert all(row["tokens_per_second"] > 0 and row["largest_group"] == 8 for row in rows)
