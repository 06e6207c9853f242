"""Every backend equals masked attention written out in full, outputs and gradients, on random trees."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from raygrpo.shared_prefix import Segment, SharedPrefixBatch
from raygrpo.shared_prefix.backends import BackendChoice
from raygrpo.shared_prefix.backends.flex import block_mask, flex_attend
from tests.shared_prefix.test_layout import forests

cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def written_out(q, k, v, plan, *, scale, window, softcap, external):
    """Attention with a full [T, E + T] mask, from the parents of segments alone; of it the rows of the queries."""
    segment = torch.repeat_interleave(torch.arange(len(plan.parents)), torch.tensor(plan.own.k_lens))
    position = torch.arange(len(segment)) - torch.tensor(plan.starts)[segment] + torch.tensor(plan.offsets)[segment]
    above = torch.eye(len(plan.parents), dtype=torch.bool)
    for index, parent in enumerate(plan.parents):
        if parent is not None:
            above[index] |= above[parent]
    seen = above[segment][:, segment]
    key_position = position
    if external is not None:
        k, v = torch.cat([external[0], k]), torch.cat([external[1], v])
        seen = torch.cat([torch.ones(len(segment), plan.num_external, dtype=torch.bool), seen], 1)
        key_position = torch.cat([torch.arange(plan.num_external), position])
    distance = position[:, None] - key_position
    seen &= distance >= 0
    if window is not None:
        seen &= distance < window
    queries = [
        start + k_len - q_len + offset
        for start, k_len, q_len in zip(plan.starts, plan.own.k_lens, plan.own.q_lens, strict=True)
        for offset in range(q_len)
    ]
    seen, repeats = seen[queries].to(q.device), q.shape[1] // k.shape[1]
    scores = torch.einsum("nhd,mhd->hnm", q, k.repeat_interleave(repeats, 1)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hnm,mhd->nhd", weights, v.repeat_interleave(repeats, 1))


def tensors(plan, heads, kv_heads, size, dtype=torch.float64, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    extra, keys = plan.num_external, (sum(plan.own.k_lens), kv_heads, size)
    shapes = [(sum(plan.own.q_lens), heads, size), keys, keys]
    shapes += [(extra, kv_heads, size)] * 2 if extra else []
    made = [torch.randn(s, generator=g, dtype=torch.float64).to(device, dtype).requires_grad_() for s in shapes]
    return made, torch.randn(shapes[0], generator=g, dtype=torch.float64).to(device, dtype)


def run(attend, inputs, d_out, plan, **kind):
    q, k, v, *external = inputs
    out = attend(q, k, v, plan=plan, scale=0.4, external=tuple(external) or None, **kind)
    return [out, *torch.autograd.grad(out, inputs, d_out)]


def check(name, plan, *, tolerance, dtype=torch.float64, device="cpu", size=8, **kind):
    # Nothing but rounding is left of the gradient of keys that stand alone in their softmax, hence the 0.1.
    for heads, kv_heads in ((4, 4), (4, 2), (4, 1)):
        inputs, d_out = tensors(plan, heads, kv_heads, size, dtype, device)
        wide = [x.detach().double().requires_grad_() for x in inputs]
        actual = run(BackendChoice(name).attend, inputs, d_out, plan, **kind)
        for a, b in zip(actual, run(written_out, wide, d_out.double(), plan, **kind), strict=True):
            assert (a.double() - b).abs().max() <= tolerance * b.abs().max().clamp(min=0.1)


KINDS = [(None, None), (3, None), (None, 1.5), (3, 1.5)]
FOREST = [
    Segment(range(300)), Segment(range(260), 0), Segment(range(7), 0), Segment(range(130), 1), Segment(range(3), 1),
    Segment(range(1)), Segment(range(2), 5), Segment(range(200), 5), Segment(range(9), 3), Segment(range(8), 3),
]  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(forests(), st.sampled_from(KINDS), st.sampled_from(["auto", "dense"]), st.booleans())
def test_attention_on_random_trees(segments, kind, name, last_layer):
    plan = SharedPrefixBatch.from_tree(segments).plan
    check(name, plan.last_layer if last_layer else plan, tolerance=1e-12, window=kind[0], softcap=kind[1])


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, None), (130, None), (30, 1.5)])
def test_attention_behind_a_prefix_that_was_encoded_before(window, softcap):
    plan = SharedPrefixBatch.continuing(range(140), [range(5), range(5), range(1), range(9)]).plan
    check("auto", plan, tolerance=1e-12, window=window, softcap=softcap)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_attention_in_other_precisions(dtype, tolerance):
    whole = SharedPrefixBatch.from_tree(FOREST).plan
    for plan, window in itertools.product((whole, whole.last_layer), (None, 100)):
        check("cpu-flash", plan, tolerance=tolerance, dtype=dtype, size=16, window=window, softcap=None)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("external", [0, 200])
@pytest.mark.parametrize("last_layer", [False, True])
def test_flex_forward_and_block_mask(window, softcap, external, last_layer):
    """Uncompiled, on the CPU: forward only, which is all that torch allows there."""
    segments = [range(150), range(40), range(130), range(300)]
    plan = (
        SharedPrefixBatch.continuing(range(external), segments) if external else SharedPrefixBatch.from_tree(FOREST)
    ).plan
    plan = plan.last_layer if last_layer else plan
    inputs, _ = tensors(plan, 4, 2, 16, torch.float32)
    q, k, v, *rest = (x.detach() for x in inputs)
    kind = {"scale": 0.4, "window": window, "softcap": softcap, "external": tuple(rest) or None}
    out = flex_attend(flex_attention, q, k, v, plan, **kind)
    assert (out - written_out(q, k, v, plan, **kind)).abs().max() < 1e-5
    mask = block_mask(plan, window, torch.device("cpu"))
    visible = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
    assert visible < 0.85 * mask.kv_indices.shape[-1] * mask.kv_indices.shape[-2]  # it skips blocks
    assert window or mask.full_kv_num_blocks.sum() > 0  # and does not mask those that are seen wholly


def test_auto_says_once_that_it_takes_the_slow_way(caplog):
    plan = SharedPrefixBatch.from_tree(FOREST).plan
    inputs, d_out = tensors(plan, 2, 2, 8)
    choice = BackendChoice("auto")
    for _ in range(2):
        run(choice.attend, inputs, d_out, plan, window=None, softcap=2.0)
    assert [record.message for record in caplog.records] == [
        "shared-prefix attention runs on 'dense' for some layers: cpu-flash: no softcap"
    ]


def test_a_named_backend_that_cannot_refuses():
    plan = SharedPrefixBatch.from_tree(FOREST).plan
    inputs, d_out = tensors(plan, 2, 2, 8)
    with pytest.raises(ValueError, match="cpu-flash: no softcap"):
        run(BackendChoice("cpu-flash").attend, inputs, d_out, plan, window=None, softcap=2.0)
    with pytest.raises(ValueError, match="aten-flash: tensors are on cpu"):
        run(BackendChoice("aten-flash").attend, inputs, d_out, plan, window=None, softcap=None)
    with pytest.raises(ValueError, match="'flash' is not one of auto, cpu-flash"):
        BackendChoice("flash")


@pytest.mark.parametrize("name", [pytest.param(name, marks=cuda) for name in ("aten-flash", "flash-attn", "flex")])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (100, None), (None, 1.5), (100, 1.5)])
@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("last_layer", [False, True])
def test_attention_on_cuda(name, window, softcap, external, last_layer):
    if name == "flash-attn":
        pytest.importorskip("flash_attn")
    if name == "aten-flash" and softcap:
        pytest.skip("torch's kernels have no softcap")
    batch = (
        SharedPrefixBatch.continuing(range(140), [range(5), range(300)])
        if external
        else SharedPrefixBatch.from_tree(FOREST)
    )
    plan = batch.plan.last_layer if last_layer else batch.plan
    check(name, plan, tolerance=3e-2, dtype=torch.bfloat16, device="cuda", size=64, window=window, softcap=softcap)


@pytest.mark.parametrize(("version", "usable"), [("2.6.3", False), ("2.7.0", True), ("2.10.0.post1", True)])
def test_a_flash_attn_that_is_called_otherwise_is_not_used(version, usable, monkeypatch):
    from raygrpo.shared_prefix.backends.cuda_flash import FlashAttnPackage

    monkeypatch.setattr("importlib.metadata.version", {"flash-attn": version}.__getitem__)
    monkeypatch.setattr("importlib.import_module", lambda name: name)
    if usable:
        FlashAttnPackage()
    else:
        with pytest.raises(ImportError, match=r"flash-attn 2.6.3 is there, and 2.7 or newer is needed"):
            FlashAttnPackage()
