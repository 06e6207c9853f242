"""Sharded models, whole and in parts: DeepSpeed takes the steps of plain torch, FSDP2 has its gradients."""

import json
import os
import socket
import subprocess
import sys

DEEPSPEED = r"""
import copy, functools, json, sys
import torch, deepspeed
from raygrpo.shared_prefix import PassCounts, accumulate_gradients, enable_shared_prefix
from tests.shared_prefix.tiny import ragged_groups, tiny_model

torch.set_num_threads(1)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
groups = ragged_groups()
num_tokens = sum(len(member) for _, members in groups for member in members)
weights = torch.randn(num_tokens, generator=torch.Generator().manual_seed(1))
loss_fn = lambda logprobs, part: (logprobs * weights[part.tokens]).sum() / num_tokens
results = []
for stage in (1, 2, 3):
    for tied in (False, True):
        model = tiny_model("qwen3", torch.float32, initializer_range=0.05, tie_word_embeddings=tied)
        if tied:
            model.gradient_checkpointing_enable()
        enable_shared_prefix(model)
        plain = copy.deepcopy(model)
        plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.3)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.3),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "managed_gradient_accumulation": False,
                "gradient_clipping": 0.0,
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
                "zero_allow_untested_optimizer": True,
            },
        )
        backward = functools.partial(engine.backward, scale_wrt_gas=False)
        for _ in range(2):
            expected = accumulate_gradients(plain, groups, loss_fn, 30)
            plain_optimizer.step(), plain_optimizer.zero_grad()
            actual = accumulate_gradients(engine, groups, loss_fn, 30, backward=backward, counts=PassCounts(9, (4, 3)))
            engine.step()
        parameters = list(model.parameters())
        with deepspeed.zero.GatheredParameters(parameters, enabled=stage == 3):
            start = tiny_model("qwen3", torch.float32, initializer_range=0.05, tie_word_embeddings=tied)
            pairs = list(zip(plain.parameters(), parameters, start.parameters(), strict=True))
            error = max((a - b).abs().max().item() for a, b, _ in pairs)
            moved = max((a - c).abs().max().item() for a, _, c in pairs)
        results.append([stage, tied, error, moved, (actual.logprobs - expected.logprobs).abs().max().item()])
print("RESULTS" + json.dumps(results))
"""


FSDP = r"""
import copy, json
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from raygrpo.shared_prefix import accumulate_gradients, enable_shared_prefix
from tests.shared_prefix.tiny import ragged_groups, tiny_model

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
model = tiny_model("qwen3", torch.float32, initializer_range=0.05)
model.gradient_checkpointing_enable()
enable_shared_prefix(model)
plain = copy.deepcopy(model)
for module in (*model.model.layers, model.lm_head, model):
    fully_shard(module, mesh=mesh)
loss_fn = lambda logprobs, part: (logprobs * (1 + part.tokens % 3)).mean()
results = []
for max_tokens in (1000, 30):
    expected = accumulate_gradients(plain, ragged_groups(), loss_fn, max_tokens)
    actual = accumulate_gradients(model, ragged_groups(), loss_fn, max_tokens)
    pairs = zip(plain.parameters(), model.parameters(), strict=True)
    error = max(((p.grad - q.grad.full_tensor()).abs().max() / p.grad.abs().max()).item() for p, q in pairs)
    results.append([(actual.logprobs - expected.logprobs).abs().max().item(), error])
print("RESULTS" + json.dumps(results))
"""


def test_zero_stages_take_the_steps_of_plain_torch():
    results = _run(DEEPSPEED)
    assert [row[:2] for row in results] == [[stage, tied] for stage in (1, 2, 3) for tied in (False, True)]
    for *_, error, moved, logprob_error in results:
        assert moved > 0.02
        assert error < 1e-5 * moved + 1e-6
        assert logprob_error < 2e-5


def test_fsdp2_has_the_gradients_of_plain_torch():
    for logprob_error, gradient_error in _run(FSDP):
        assert logprob_error < 1e-5
        assert gradient_error < 1e-5


def _run(script: str) -> list:
    """What a script prints after RESULTS, in a process of its own: both libraries keep global state."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    script = script.replace("tcp://127.0.0.1:0", f"tcp://127.0.0.1:{_free_port()}")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULTS"))
    return json.loads(line.removeprefix("RESULTS"))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
