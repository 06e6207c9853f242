"""The chunked LM head equals log_softmax of all logits, however it is cut, and holds one chunk at a time."""

import pytest
import torch

from raygrpo.shared_prefix.head import HeadRequest, LogitTransform, token_logprobs

ROWS, HIDDEN, VOCABULARY = 13, 6, 50


def example(dtype=torch.float64, tokens=31, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((ROWS, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,))
    )
    rows = torch.randint(ROWS, (tokens,), generator=g)
    targets = torch.randint(VOCABULARY, (tokens,), generator=g)
    rows[5], targets[5] = rows[4], targets[4]  # two tokens that are the same in all respects
    return (hidden, weight, bias), rows, targets


def written_out(hidden, weight, bias, request):
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    logits = logits * request.transform.scale
    if request.transform.softcap is not None:
        logits = request.transform.softcap * torch.tanh(logits / request.transform.softcap)
    log_p = (logits / request.temperature).log_softmax(-1)[request.token_rows]
    return log_p.gather(-1, request.targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def loss(values):
    g = torch.Generator().manual_seed(3)
    return sum((v * torch.randn(v.shape, generator=g, dtype=torch.float64).to(v.dtype)).sum() for v in values)


@pytest.mark.parametrize("chunk_rows", [1, 4, 13, 100])
@pytest.mark.parametrize(
    "transform", [LogitTransform(), LogitTransform(0.3), LogitTransform(1.0, 2.0), LogitTransform(3.0, 1.5)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_equals_log_softmax_for_every_cut(chunk_rows, transform, bias):
    (hidden, weight, offset), rows, targets = example()
    inputs = (hidden, weight, offset if bias else None)
    request = HeadRequest(rows, targets, 0.7, True, transform, chunk_rows=chunk_rows)
    ours, expected = token_logprobs(*inputs, request), written_out(*inputs, request)
    wanted = [x for x in inputs if x is not None]
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).abs().max() < 1e-13
    for terms in (slice(0, 1), slice(1, 2), slice(0, 2)):
        grads = torch.autograd.grad(loss(ours[terms]), wanted, retain_graph=True)
        for a, b in zip(grads, torch.autograd.grad(loss(expected[terms]), wanted, retain_graph=True), strict=True):
            assert (a - b).abs().max() < 1e-12


def test_frozen_head_and_frozen_body():
    (hidden, weight, _), rows, targets = example()
    for frozen, free in ((weight, hidden), (hidden, weight)):
        frozen.requires_grad_(False), free.requires_grad_(True)
        request = HeadRequest(rows, targets)
        ours = torch.autograd.grad(loss(token_logprobs(hidden, weight, None, request)[:1]), free)[0]
        expected = torch.autograd.grad(loss(written_out(hidden, weight, None, request)[:1]), free)[0]
        assert (ours - expected).abs().max() < 1e-12


def test_bfloat16_sums_chunks_in_float32():
    """Many chunks are as close to float64 as one is."""
    (hidden, weight, _), rows, targets = example(torch.bfloat16, tokens=300)
    exact = torch.autograd.grad(
        loss(written_out(hidden.double(), weight.double(), None, HeadRequest(rows, targets))[:1]), weight
    )[0].double()

    def error(chunk_rows):
        request = HeadRequest(rows, targets, chunk_rows=chunk_rows)
        logprobs, _ = token_logprobs(hidden, weight, None, request)
        assert logprobs.dtype == torch.float32
        return (torch.autograd.grad(loss([logprobs]), weight)[0].double() - exact).norm()

    assert error(1) < 1.3 * error(100)


def test_no_tokens():
    (hidden, weight, _), rows, targets = example()
    logprobs, entropy = token_logprobs(hidden[:0], weight, None, HeadRequest(rows[:0], targets[:0], entropy=True))
    assert logprobs.shape == entropy.shape == (0,)
    assert torch.autograd.grad(logprobs.sum(), weight)[0].abs().max() == 0


def test_saves_and_computes_one_chunk_of_logits_at_a_time():
    """What is saved for backward beside the inputs does not grow with the number of rows."""

    def saved_bytes(num_rows):
        g = torch.Generator().manual_seed(0)
        hidden = torch.randn(num_rows, HIDDEN, generator=g).requires_grad_()
        weight = torch.randn(VOCABULARY, HIDDEN, generator=g).requires_grad_()
        rows = torch.arange(num_rows)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            token_logprobs(hidden, weight, None, HeadRequest(rows, rows % VOCABULARY, chunk_rows=8))
        return max(sizes[2:])

    assert saved_bytes(1000) == 1000  # row numbers, not 1000 * VOCABULARY logits
    assert saved_bytes(16) == 8 * VOCABULARY
