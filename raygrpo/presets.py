"""Named settings of the `algorithm` section: what each paper's method is in our fields. config.py applies them.

A preset names every field that makes up the method, also where it equals our default, so that printing it tells all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import BaseModel

    from raygrpo.algorithm_config import AlgorithmConfig

_GROUP_STD = {"baseline": "group", "scale": "group"}
_PPO = {"loss": "ppo_clip", "ratio": "token", "clip_low": 0.2, "clip_high": 0.2}

PRESETS: dict[str, dict[str, Any]] = {
    # Shao et al., arXiv:2402.03300, equations 3 and 4; section 4.2 for the coefficient
    "grpo": {
        "advantage": _GROUP_STD,
        **_PPO,
        "aggregation": "sequence_mean",
        "kl": {"coef": 0.04, "estimator": "k3", "placement": "loss"},
    },
    # Liu et al., arXiv:2503.20783, section 3.2: no division by the group's spread nor by a completion's own length
    "dr_grpo": {"advantage": {"baseline": "group", "scale": "none"}, **_PPO, "aggregation": "sequence_sum"},
    # Yu et al., arXiv:2503.14476, equations 8 to 13: the buffer is 4096 of 20480 tokens
    "dapo": {
        "advantage": _GROUP_STD,
        **_PPO,
        "clip_high": 0.28,
        "aggregation": "token_mean",
        "overlong": {"buffer": 0.2, "penalty": 1.0},
        "dynamic_sampling": 10,
    },
    # Zheng et al., arXiv:2507.18071, equations 5 and 7; section 5.1 for the clip
    "gspo": {
        "advantage": _GROUP_STD,
        "loss": "ppo_clip",
        "ratio": "sequence_mean",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "aggregation": "sequence_mean",
    },
    # MiniMax, arXiv:2506.13585, equations 4 and 5, without a lower bound; cap 5 as in ScaleRL, arXiv:2510.13786
    "cispo": {
        "advantage": _GROUP_STD,
        "loss": "cispo",
        "ratio": "token",
        "clip_low": 1.0,
        "clip_high": 4.0,
        "aggregation": "token_mean",
    },
    # Gao et al., arXiv:2511.20347, equations 5 and 6
    "sapo": {
        "advantage": _GROUP_STD,
        "loss": "sapo",
        "ratio": "token",
        "sapo_temperature_positive": 1.0,
        "sapo_temperature_negative": 1.05,
        "aggregation": "sequence_mean",
    },
    # Ahmadian et al., arXiv:2402.14740, section 2: completions are single actions, hence their ratio and KL as a whole
    "rloo": {
        "advantage": {"baseline": "leave_one_out", "scale": "none"},
        **_PPO,
        "ratio": "sequence",
        "aggregation": "sequence_mean",
        "kl": {"estimator": "k1", "placement": "reward"},
    },
    # Hu et al., arXiv:2501.03262, without and with the group as baseline
    "reinforce_pp": {
        "advantage": {"baseline": "none", "scale": "none", "whiten": "rollouts"},
        **_PPO,
        "aggregation": "token_mean",
        "kl": {"estimator": "k1", "placement": "reward"},
    },
    "reinforce_pp_baseline": {
        "advantage": {"baseline": "group", "scale": "none", "whiten": "rollouts"},
        **_PPO,
        "aggregation": "token_mean",
        "kl": {"estimator": "k2", "placement": "loss"},
    },
    # Liu et al., arXiv:2601.05242
    "gdpo": {
        "advantage": {"baseline": "group", "scale": "group", "per_reward": True, "whiten": "rollouts"},
        **_PPO,
        "aggregation": "token_mean",
    },
}


@dataclass(frozen=True, slots=True)
class PresetField:
    """One field that a preset set."""

    key: str  # e.g. "algorithm.kl.coef"
    preset_value: Any
    value: Any  # what holds: differs from preset_value where the run's own settings won

    def __str__(self) -> str:
        overridden = "" if self.value == self.preset_value else f" (the preset's {self.preset_value} is overridden)"
        return f"{self.key} = {self.value}{overridden}"


def preset_fields(algorithm: AlgorithmConfig) -> list[PresetField]:
    """What the chosen preset set, in order, and what became of it; [] without a preset."""

    def walk(settings: BaseModel, values: dict[str, Any], prefix: str) -> list[PresetField]:
        found = []
        for name, value in values.items():
            held, key = getattr(settings, name), f"{prefix}.{name}"
            found += walk(held, value, key) if isinstance(value, dict) else [PresetField(key, value, held)]
        return found

    return walk(algorithm, PRESETS.get(algorithm.preset or "", {}), "algorithm")
