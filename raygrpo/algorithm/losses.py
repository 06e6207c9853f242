"""The policy loss: surrogate, importance weight, KL penalty, entropy bonus, one denominator for the whole update."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raygrpo.algorithm.importance import correction_weights
from raygrpo.algorithm.kl import MAX_LOG_RATIO, kl_estimate, kl_penalty
from raygrpo.algorithm.segments import log_ratio_at_level, segment_counts
from raygrpo.algorithm_config import AlgorithmConfig


@dataclass(frozen=True, slots=True)
class Totals:
    """What means divide by: counts over all micro-batches and ranks of one update. Totals of parts add up."""

    tokens: int  # that count in the loss
    rollouts: int  # with at least one such token

    def __add__(self, other: Totals) -> Totals:
        return Totals(self.tokens + other.tokens, self.rollouts + other.rollouts)


def batch_totals(loss_mask: Tensor, rollout_index: Tensor, num_rollouts: int) -> Totals:
    """Totals of a local batch of whole rollouts. loss_mask, rollout_index: [S]. Across ranks:
    `Totals(*all_reduced(torch.tensor([totals.tokens, totals.rollouts])).tolist())`."""
    counts = segment_counts(rollout_index[loss_mask.bool()], num_rollouts)
    return Totals(int(counts.sum()), int((counts > 0).sum()))


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    loss_mask: Tensor,
    rollout_index: Tensor,
    settings: AlgorithmConfig,
    *,
    behaviour_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    totals: Totals | None = None,
    kl_coef: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's share of the update's loss (scalar), and of its metrics (see metrics.py for how they add up).

    logprobs, old_logprobs, loss_mask, rollout_index, behaviour_logprobs, ref_logprobs, entropy: [S]; advantages: [R].
    The batch holds whole rollouts. What stands where loss_mask is false is never looked at: it may be NaN. A NaN that
    counts makes the loss NaN, never less. Raises ValueError where shapes do not fit.
    old_logprobs: the learner's snapshot before the step's first update; None: logprobs.detach().
    behaviour_logprobs: the sampler's, for the importance weight and the mismatch metrics. totals: of the update;
    None: this batch is all of it. kl_coef: the steered coefficient; None: settings.kl.coef.

    Per token, with ratio r of policy to old policy (by settings.ratio), advantage A and importance weight w:
      ppo_clip  -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)    arXiv:1707.06347 (PPO), equation 7;
                arXiv:2503.14476 (DAPO) has two bounds, arXiv:2507.18071 (GSPO) the ratio sequence_mean
                and at most -dual_clip A where A < 0                 arXiv:1912.09729, equation 5
      cispo     -stop_gradient(clip(r, ...)) A logprob               arXiv:2506.13585, equations 4 and 5
      sapo      -(4 / tau) sigmoid(tau (r - 1)) A                    arXiv:2511.20347, equations 5 and 6
      loss      w * (the above) + kl.coef * KL estimate - entropy_coef * entropy, summed as settings.aggregation says
    Arithmetic is float32 at least; a log ratio beyond +-20 counts as +-20, without gradient.
    """
    _check_shapes(
        advantages,
        rollout_index,
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        loss_mask=loss_mask,
        behaviour_logprobs=behaviour_logprobs,
        ref_logprobs=ref_logprobs,
        entropy=entropy,
    )
    num_rollouts = advantages.shape[0]
    counted = loss_mask.nonzero()[:, 0]  # from here on S is the number of tokens that count
    index = rollout_index[counted]
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < num_rollouts:
        found = f"{int(index.min())} to {int(index.max())}"
        raise ValueError(f"rollout_index goes from {found}, but there are {num_rollouts} advantages")
    totals = totals or batch_totals(loss_mask, rollout_index, num_rollouts)
    logprobs = _select(logprobs, counted)
    old = logprobs.detach() if old_logprobs is None else _select(old_logprobs, counted).detach()
    advantage = advantages.to(logprobs)[index]
    share = _token_shares(index, num_rollouts, totals, settings).to(logprobs)

    log_ratio = log_ratio_at_level(logprobs - old, index, num_rollouts, settings.ratio)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    per_token, metrics = _surrogate(logprobs, ratio, advantage, settings)
    metrics |= {"policy/approx_kl": kl_estimate(old, logprobs.detach(), "k3")}
    if behaviour_logprobs is not None:
        weights, mismatch = _corrected(old, _select(behaviour_logprobs, counted), index, num_rollouts, totals, settings)
        per_token = per_token * weights
    else:
        mismatch = {}
    surrogate = (per_token * share).sum()
    loss = surrogate

    coef = settings.kl.coef if kl_coef is None else kl_coef
    if ref_logprobs is not None:
        reference = _select(ref_logprobs, counted)
        metrics["policy/kl"] = kl_estimate(logprobs, reference, settings.kl.estimator)
        if settings.kl.placement == "loss" and coef:
            loss = loss + coef * (kl_penalty(logprobs, reference, logprobs - old, settings) * share).sum()
    elif settings.kl.placement == "loss" and coef:
        raise ValueError(f"algorithm.kl.coef is {coef} in the loss: policy_loss needs ref_logprobs")
    if entropy is not None:
        entropy = _select(entropy, counted)
        metrics["policy/entropy"] = entropy
        if settings.entropy_coef:
            loss = loss - settings.entropy_coef * (entropy * share).sum()
    elif settings.entropy_coef:
        raise ValueError(f"algorithm.entropy_coef is {settings.entropy_coef}: policy_loss needs entropy")

    tokens = max(totals.tokens, 1)
    reduced = {name: value.detach().to(logprobs).sum() / tokens for name, value in metrics.items()}
    reduced |= {"policy/loss": loss.detach(), "policy/surrogate": surrogate.detach(), "policy/ratio_max": _max(ratio)}
    return loss, reduced | mismatch


def _check_shapes(advantages: Tensor, rollout_index: Tensor, **per_token: Tensor | None) -> None:
    if advantages.ndim != 1:
        raise ValueError(f"advantages are [R], one for each rollout; got {list(advantages.shape)}")
    if rollout_index.ndim != 1 or rollout_index.is_floating_point():
        shape = list(rollout_index.shape)
        raise ValueError(f"rollout_index is [S], integers, without padding; got {shape}, {rollout_index.dtype}")
    for name, values in per_token.items():
        if values is not None and values.shape != rollout_index.shape:
            raise ValueError(f"{name} is {list(values.shape)} but rollout_index {list(rollout_index.shape)}")


def _select(values: Tensor, counted: Tensor) -> Tensor:
    values = values[counted]
    return values if values.dtype == torch.float64 else values.float()


def _max(values: Tensor) -> Tensor:
    """0 for an empty batch: it changes no maximum, since all values are positive."""
    return values.detach().max() if len(values) else values.new_zeros(())


def _token_shares(index: Tensor, num_rollouts: int, totals: Totals, settings: AlgorithmConfig) -> Tensor:
    """[S]: what a token's loss is multiplied by, so that the sum over the update is the aggregation that was asked
    for."""
    shares = torch.ones(len(index), dtype=torch.float64, device=index.device)
    if settings.aggregation == "token_mean":
        return shares / max(totals.tokens, 1)
    shares = shares / max(totals.rollouts, 1)
    if settings.aggregation == "sequence_mean":
        return shares / segment_counts(index, num_rollouts)[index]
    if settings.aggregation_length is None:
        raise ValueError("algorithm.aggregation is sequence_sum: set aggregation_length, the constant it divides by")
    return shares / settings.aggregation_length


def _surrogate(
    logprobs: Tensor, ratio: Tensor, advantage: Tensor, settings: AlgorithmConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Per-token loss [S] before the importance weight, and per-token metrics [S] to be averaged over tokens."""
    if settings.loss == "sapo":
        positive = ratio.new_tensor(
            settings.sapo_temperature_positive
        )  # as tensors: of two numbers, where() makes float32
        negative = ratio.new_tensor(settings.sapo_temperature_negative)
        tau = torch.where(advantage > 0, positive, negative)
        return -advantage * torch.sigmoid(tau * (ratio - 1)) * 4 / tau, {}
    low, high = 1 - settings.clip_low, 1 + settings.clip_high
    clipped = ratio.clamp(low, high)
    if settings.loss == "cispo":
        metrics = {"policy/clip_fraction": (ratio < low) | (ratio > high)}
        return -clipped.detach() * advantage * logprobs, metrics
    # Only these tokens lose their gradient; a ratio out of bounds on the other side pulls back.
    too_low, too_high = (ratio < low) & (advantage < 0), (ratio > high) & (advantage > 0)
    metrics = {
        "policy/clip_fraction": too_low | too_high,
        "policy/clip_fraction_low": too_low,
        "policy/clip_fraction_high": too_high,
    }
    per_token = -torch.minimum(ratio * advantage, clipped * advantage)
    if settings.dual_clip is not None:
        metrics["policy/dual_clip_fraction"] = (ratio > settings.dual_clip) & (advantage < 0)
        bound = torch.where(advantage < 0, -settings.dual_clip * advantage, torch.inf)
        per_token = torch.minimum(per_token, bound)
    return per_token, metrics


def _corrected(
    old: Tensor, behaviour: Tensor, index: Tensor, num_rollouts: int, totals: Totals, settings: AlgorithmConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Importance weight of each token [S], and what the mismatch looks like (reduced)."""
    weights, ratio = correction_weights(old, behaviour, index, settings, num_rollouts=num_rollouts)
    difference = old - behaviour
    tokens = max(totals.tokens, 1)
    if settings.correction.level in ("token", "none"):
        share = ratio.new_full(ratio.shape, 1 / tokens)
    else:  # one ratio for each rollout, repeated on its tokens
        share = 1 / segment_counts(index, num_rollouts)[index].to(ratio) / max(totals.rollouts, 1)
    corrected = (weights != ratio) & (settings.correction.level != "none")
    return weights, {
        "sampling/logprob_diff": difference.abs().sum() / tokens,
        "sampling/logprob_diff_max": _max(difference.abs()),
        "sampling/kl": kl_estimate(behaviour, old, "k3").sum() / tokens,
        "sampling/is_ratio_mean": (ratio * share).sum(),
        "sampling/is_ratio_square_mean": (ratio.square() * share).sum(),
        "sampling/is_ratio_max": _max(ratio),
        "sampling/is_clipped_fraction": (corrected * share).sum(),
    }
