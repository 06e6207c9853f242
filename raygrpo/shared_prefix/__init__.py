"""Encode a prompt once for all its completions, exactly: log-probabilities and every parameter gradient are those of
encoding prompt + completion one by one (Prefix Grouper, arXiv:2506.05433), for the cost of each distinct token once.

In any training loop, on any Hugging Face decoder:

    enable_shared_prefix(model)                                     # once, before anything wraps the model
    batch = SharedPrefixBatch.from_groups([(prompt_ids, [completion_ids, ...]), ...])
    logprobs = completion_logprobs(model, batch, temperature=1.0)   # [S], all completions in order, differentiable

`score_completions` also returns entropies. The batch maps between per-token values [S] and completions: `split`,
`expand`, `sum_by_completion`, `pad`.

With DeepSpeed (any ZeRO stage), DDP or FSDP, pass the wrapped model in place of the model: each call is one ordinary
forward of it, so its hooks gather and reduce as usual.

    enable_shared_prefix(model)
    engine, *_ = deepspeed.initialize(model=model, ...)
    scores = score_completions(engine, batch, temperature=1.0, entropy=True)
    engine.backward(loss(scores.logprobs))

ZeRO-3 and FSDP need as many passes on every rank: a rank that is out of work scores `SharedPrefixBatch.padding()` and
backpropagates 0 * logprobs.sum(). `accumulate_gradients` does all of that: it packs any number of groups into streams
of max_tokens, splits those that are too large, scores, calls loss_fn and backpropagates:

    counts = PassCounts.maximum(gathered from all ranks: plan_passes(groups, max_tokens).counts)
    result = accumulate_gradients(engine, groups, loss_fn, max_tokens, backward=engine.backward, counts=counts)

where loss_fn(logprobs [s], part) returns this part's share of the loss; `part.tokens` [s] and `part.completions` index
whatever the caller holds per token or per completion, over all groups.

Reading order: tree.py and layout.py (which tokens a stream holds), backends/merged_flash.py (attention over it, and why
it is exact) and the other backends, head.py (the LM head in chunks), model.py (the hook into transformers),
last_layer.py (what it leaves out), supported.py and self_check.py (what is refused), packing.py and accumulate.py (many
groups), cost.py (the FLOP model).
"""

from raygrpo.shared_prefix.accumulate import Accumulated, Part, accumulate_gradients
from raygrpo.shared_prefix.cost import ModelShape, forward_flops, num_tokens, speedup_limit, training_flops
from raygrpo.shared_prefix.layout import AttentionPlan, SharedPrefixBatch
from raygrpo.shared_prefix.model import (
    CompletionScores,
    completion_logprobs,
    enable_shared_prefix,
    score_completions,
)
from raygrpo.shared_prefix.packing import PassCounts, Passes, assign_to_ranks, pack, plan_passes
from raygrpo.shared_prefix.self_check import SelfCheckError
from raygrpo.shared_prefix.supported import UnsupportedModelError
from raygrpo.shared_prefix.tree import Segment

__all__ = [
    "Accumulated",
    "AttentionPlan",
    "CompletionScores",
    "ModelShape",
    "Part",
    "PassCounts",
    "Passes",
    "Segment",
    "SelfCheckError",
    "SharedPrefixBatch",
    "UnsupportedModelError",
    "accumulate_gradients",
    "assign_to_ranks",
    "completion_logprobs",
    "enable_shared_prefix",
    "forward_flops",
    "num_tokens",
    "pack",
    "plan_passes",
    "score_completions",
    "speedup_limit",
    "training_flops",
]
