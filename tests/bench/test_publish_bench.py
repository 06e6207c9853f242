"""The benchmark of publishing: real engines hold what was published, round after round, and every second is counted."""

from __future__ import annotations

import json

import pytest
import torch

from raygrpo import weights
from raygrpo.bench import publish

pytestmark = pytest.mark.timeout(300)
SMALL = {"hidden": 64, "vocabulary": 320}


@pytest.mark.parametrize("weight_transfer", ["object_store", "direct"])
def test_generators_compute_the_published_model_after_every_round(ray_session, tmp_path, weight_transfer, monkeypatch):
    packs: list[int] = []
    monkeypatch.setattr(weights, "pack", lambda *args, pack=weights.pack, **how: packs.append(1) or pack(*args, **how))
    settings = SMALL | {"num_generators": 2, "rounds": 3, "weight_transfer": weight_transfer}
    costs = publish.run(tmp_path, megabytes=2, dtype="float32", **settings)
    assert len(packs) == (3 if weight_transfer == "object_store" else 0)
    assert len(costs) == 3
    for cost in costs:
        assert cost.logprob_diff < 1e-4
        assert abs(cost.num_bytes - 2e6) < 5e5
        assert 0 < cost.load_s < cost.ack_s and cost.cpu_s > 0
        assert cost.gb_per_s == pytest.approx(cost.num_bytes / 1e9 / (cost.pack_s + cost.put_s + cost.ack_s))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_publish_that_was_lost_would_be_noticed(tmp_path, dtype):
    """The log-probabilities of two rounds differ by more than the limit allows."""
    model = publish.random_model(tmp_path, megabytes=1, dtype=dtype, **SMALL)
    before = publish._logprobs(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + publish.CHANGE)
    difference = (publish._logprobs(model) - before).abs().mean().item()
    assert difference > 3 * publish.MAX_LOGPROB_DIFF[dtype]


def test_a_generator_with_other_weights_is_an_error(ray_session, tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "_logprobs", lambda model, logprobs=publish._logprobs: logprobs(model) + 0.01)
    with pytest.raises(RuntimeError, match=r"log-probabilities differ by 0\.01"):
        publish.run(tmp_path, megabytes=1, dtype="float32", rounds=1, **SMALL)


def test_the_command_prints_a_table_or_json(monkeypatch, capsys):
    cost = publish.PublishCost(
        num_bytes=10**9, pack_s=0.1, put_s=0.2, ack_s=0.7, load_s=0.6, cpu_s=0.9, logprob_diff=1e-6
    )
    monkeypatch.setattr(publish, "run", lambda directory, **settings: [cost] * settings["rounds"])
    publish.main(rounds=2)
    assert "1.00 GB/s at best: 1000 MB in float32, 1 generator (mark: 0.7 for 500 MB)" in capsys.readouterr().out
    publish.main(rounds=2, json=True)
    assert [row["gb_per_s"] for row in json.loads(capsys.readouterr().out)] == [1.0, 1.0]
