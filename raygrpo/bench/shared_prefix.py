"""How fast and how small the shared-prefix forward and backward are, against the ways to do without.

A tiny Qwen3 (hidden 256, 4 layers, vocabulary 4096) on one thread, in CPU time. All methods see the same tokens; every
step has new tokens and new ragged lengths (half to one and a half of the mean); methods are interleaved step by step in
one process, so that whatever else the machine does hits all alike; ratios are taken within a step, then the median.
A point takes five steps, or as many as fit 20 CPU seconds, and two at least: long steps scatter less.

    U = (t_packed / t_shared) / (FLOP_packed / FLOP_shared)

is how much of the speed-up that cost.py allows is reached: 1 where the code is as efficient as packed sequences are. It
can exceed 1, because cost.py counts every row in every layer, and the last layer (last_layer.py) runs fewer.
On a machine with CUDA, gpu_ladder.py adds real model shapes.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json as json_format
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from raygrpo.bench.forward_methods import METHODS
from raygrpo.bench.memory import PeakMemory, saved_bytes
from raygrpo.bench.tables import table
from raygrpo.shared_prefix import enable_shared_prefix
from raygrpo.shared_prefix.cost import ModelShape, speedup_limit
from raygrpo.shared_prefix.layout import Group

VOCABULARY = 4096
STREAM_TOKENS = 2048  # a step holds as many groups as a stream of that size does, as a learner's would
MIN_STEPS, MAX_STEPS, POINT_SECONDS = 2, 5, 20.0


@dataclass(frozen=True)
class Point:
    """Prompt length, mean completion length, completions per prompt."""

    prompt: int
    completion: int
    group_size: int


@dataclass(frozen=True)
class Measurement:
    """One point. speedup: of the shared method over each. seconds: median CPU time of a forward and backward. saved,
    peak: bytes. Differences are from the packed method: of any log-probability, and of any gradient relative to that
    parameter's largest entry."""

    point: Point
    num_groups: int
    num_steps: int
    limit: float
    utilisation: float
    speedup: dict[str, float]
    seconds: dict[str, float]
    saved: dict[str, int]
    peak: dict[str, int]
    logprob_difference: dict[str, float]
    gradient_difference: dict[str, float]


GRID = [Point(p, p // ratio, g) for p in (256, 1024, 2048) for ratio in (1, 4, 16) for g in (4, 8, 16)]
QUICK = [Point(256, 256, 4), Point(256, 64, 4), Point(256, 16, 8), Point(512, 32, 8)]
SWEEP = [Point(1024, 64, g) for g in (1, 2, 4, 8, 16, 32)]
NO_GAIN = [Point(1024, 256, 1), Point(64, 64, 1), Point(1, 32, 8), Point(1, 256, 8), Point(4, 256, 8), Point(8, 8, 2)]
MARK = Point(1024, 64, 16)  # where saved bytes are compared


def main(json: bool = False, quick: bool = False, resume: Path | None = None) -> None:
    """Print the tables, or one JSON document; progress goes to stderr.

    quick: four points, in about a minute. resume: a file that keeps every finished point; those in it are not measured
    again.
    """
    results = run(quick=quick, resume=resume)
    print(json_format.dumps(results, indent=1) if json else _report(results))


def run(*, quick: bool = False, resume: Path | None = None) -> dict:
    """All measurements as plain data."""
    everything = [name for name in METHODS if name != "prefix-grouper" or importlib.util.find_spec("prefix_grouper")]
    ours = ["shared", "packed"]
    # What one group costs, with --quick and as it grows, shows with one group in a stream.
    jobs = [("grid", point, everything, 1 if quick else STREAM_TOKENS) for point in (QUICK if quick else GRID)]
    if not quick:
        jobs += [("no_gain", point, ours, STREAM_TOKENS) for point in NO_GAIN]
        jobs += [("sweep", point, ours, 1) for point in SWEEP]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        results = _measure_all(jobs, resume)
    finally:
        torch.set_num_threads(threads)
    results["ladder"] = []
    if torch.cuda.is_available():
        from raygrpo.bench import gpu_ladder

        results["ladder"] = gpu_ladder.run(quick=quick)
    return results


def _measure_all(jobs: Sequence[tuple[str, Point, Sequence[str], int]], resume: Path | None) -> dict:
    """Measurements by section, in the order of sections, the cheapest first."""
    done: dict[tuple, dict] = {}
    if resume is not None and resume.exists():
        for line in resume.read_text().splitlines():
            row = json_format.loads(line)
            done[row["section"], Point(**row["measurement"]["point"])] = row["measurement"]
    model = tiny_qwen3()
    order = list(dict.fromkeys(section for section, *_ in jobs))
    by_cost = sorted(jobs, key=lambda job: (order.index(job[0]), _repeated_tokens(job[1])))
    for number, (section, point, methods, stream_tokens) in enumerate(by_cost, start=1):
        if (section, point) in done:
            continue
        started = time.monotonic()
        measured = measure(model, point, methods, stream_tokens=stream_tokens)
        done[section, point] = asdict(measured)
        if resume is not None:
            with resume.open("a") as file:
                file.write(json_format.dumps({"section": section, "measurement": asdict(measured)}) + "\n")
        against = ", ".join(f"{measured.speedup[name]:.2f} x {name}" for name in methods[1:])
        seconds = time.monotonic() - started
        print(f"[{number}/{len(jobs)}] {point}: {against} ({seconds:.0f} s)", file=sys.stderr, flush=True)
    return {
        name: [done[name, point] for section, point, *_ in jobs if section == name]
        for name in ("grid", "no_gain", "sweep")
    }


def _repeated_tokens(point: Point) -> int:
    return point.group_size * (point.prompt + point.completion)


def tiny_qwen3() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).train()
    enable_shared_prefix(model)
    return model


def measure(
    model: PreTrainedModel, point: Point, methods: Sequence[str], *, stream_tokens: int, max_steps: int = MAX_STEPS
) -> Measurement:
    """Timed steps of every method, after one that warms up, compares results and measures memory.

    The padded method is timed once: it is the slowest, and no mark depends on it.
    """
    generator = torch.Generator().manual_seed(hash(point) % 2**31)
    num_groups = max(1, stream_tokens // (point.prompt + point.group_size * point.completion))
    shape = ModelShape.from_config(model.config)
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    limits = []

    groups = _draw(point, num_groups, generator)
    first = {name: _examine(model, name, groups) for name in methods}
    step_seconds = sum(first[name].seconds for name in methods if name != "padded")
    for step in range(min(max_steps, max(MIN_STEPS, int(POINT_SECONDS / step_seconds)))):
        groups = _draw(point, num_groups, generator)
        limits.append(_limit(shape, groups))
        for name in methods[:: -1 if step % 2 else 1]:  # to and fro, so that a drift hits all alike
            if name != "padded" or not seconds[name]:
                seconds[name].append(_time(model, name, groups))

    def over(name: str) -> list[float]:
        return [other / ours for other, ours in zip(seconds[name], seconds["shared"], strict=False)]

    logprobs, gradients = first["packed"].logprobs, first["packed"].gradients
    return Measurement(
        point=point,
        num_groups=num_groups,
        num_steps=len(limits),
        limit=median(limits),
        utilisation=median(ratio / limit for ratio, limit in zip(over("packed"), limits, strict=True)),
        speedup={name: median(over(name)) for name in methods},
        seconds={name: median(values) for name, values in seconds.items()},
        saved={name: examined.saved for name, examined in first.items()},
        peak={name: examined.peak for name, examined in first.items()},
        logprob_difference={
            name: (examined.logprobs - logprobs).abs().max().item() for name, examined in first.items()
        },
        gradient_difference={
            name: _gradient_difference(examined.gradients, gradients) for name, examined in first.items()
        },
    )


def _limit(shape: ModelShape, groups: Sequence[Group]) -> float:
    return speedup_limit(shape, [(len(prompt), [len(member) for member in members]) for prompt, members in groups])


def _draw(point: Point, num_groups: int, generator: torch.Generator) -> list[Group]:
    def ids(length: int) -> list[int]:
        return torch.randint(VOCABULARY, (length,), generator=generator).tolist()

    shortest, longest = max(1, point.completion // 2), point.completion + point.completion // 2
    groups = []
    for _ in range(num_groups):
        lengths = torch.randint(shortest, longest + 1, (point.group_size,), generator=generator).tolist()
        groups.append((ids(point.prompt), [ids(length) for length in lengths]))
    return groups


@dataclass(frozen=True)
class _Examined:
    logprobs: Tensor
    gradients: dict[str, Tensor]
    saved: int
    peak: int
    seconds: float


def _examine(model: PreTrainedModel, name: str, groups: Sequence[Group]) -> _Examined:
    """One step with its results and its memory; gradients that accumulate count as memory, parameters do not."""
    forward = METHODS[name].prepare(model, groups)
    model.zero_grad(set_to_none=True)
    gc.collect()
    start = time.process_time()
    with PeakMemory() as memory:
        logprobs, saved = saved_bytes(forward, model.parameters())
        (-logprobs.mean()).backward()
    seconds = time.process_time() - start
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return _Examined(logprobs.detach(), gradients, saved, memory.peak, seconds)


def _time(model: PreTrainedModel, name: str, groups: Sequence[Group]) -> float:
    """CPU seconds of one forward and backward."""
    forward = METHODS[name].prepare(model, groups)
    model.zero_grad(set_to_none=True)
    gc.collect()
    start = time.process_time()
    (-forward().mean()).backward()
    return time.process_time() - start


def _gradient_difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(((actual[key] - g).abs().max() / g.abs().max()).item() for key, g in expected.items())


def _report(results: dict) -> str:
    """All tables, and the marks."""
    grid, no_gain, sweep = (
        [Measurement(**{**row, "point": Point(**row["point"])}) for row in results[name]]
        for name in ("grid", "no_gain", "sweep")
    )
    parts = [_grid_table(grid), _marks(grid)]
    if no_gain:
        parts += ["Where sharing cannot pay", _no_gain_table(no_gain)]
    if sweep:
        parts += ["Cost of one group as it grows", _sweep_table(sweep)]
    if results["ladder"]:
        from raygrpo.bench.gpu_ladder import ladder_table

        parts += ["Real model shapes", ladder_table(results["ladder"])]
    else:
        parts.append("No CUDA device: the ladder of real model shapes did not run.")
    return "\n\n".join(parts)


def _grid_table(grid: Sequence[Measurement]) -> str:
    others = [name for name in grid[0].seconds if name != "shared"]
    header = ["Lp", "Lr", "G", "groups", "steps", "limit", *(f"x {name}" for name in others), "U"]
    header += ["saved MB", *(f"saved {name}" for name in others), "peak MB", *(f"peak {name}" for name in others)]
    header += ["d logprob", "d gradient"]
    rows = []
    for m in grid:
        row = [m.point.prompt, m.point.completion, m.point.group_size, m.num_groups, m.num_steps]
        cells = [str(cell) for cell in row] + [f"{m.limit:.2f}"]
        cells += [f"{m.speedup[name]:.2f}" for name in others] + [f"{m.utilisation:.3f}"]
        for sizes in (m.saved, m.peak):
            cells += [f"{sizes[name] / 1e6:.0f}" for name in ("shared", *others)]
        cells += [f"{m.logprob_difference['shared']:.0e}", f"{m.gradient_difference['shared']:.0e}"]
        rows.append(cells)
    return table(header, rows)


def _marks(grid: Sequence[Measurement]) -> str:
    """The figures that this package is held to."""
    use = [m.utilisation for m in grid]
    lines = [f"U: median {median(use):.3f}, lowest {min(use):.3f} (marks: 0.95, 0.85)"]
    over = [m.speedup["prefix-grouper"] for m in grid if "prefix-grouper" in m.speedup]
    if over:
        mean = math.exp(sum(map(math.log, over)) / len(over))
        lines.append(f"against prefix-grouper: geometric mean {mean:.2f}x, lowest {min(over):.2f}x (marks: 1.25, 0.97)")
    else:
        lines.append("prefix-grouper is not installed: pip install --no-deps prefix-grouper")
    for m in grid:
        if m.point == MARK and "prefix-grouper" in m.saved:
            ratio = m.saved["shared"] / m.saved["prefix-grouper"]
            lines.append(f"bytes saved for backward at {MARK}: {ratio:.3f} of prefix-grouper's (mark: 0.75)")
    return "\n".join(lines)


def _no_gain_table(points: Sequence[Measurement]) -> str:
    rows = []
    for m in points:
        cells = [m.point.prompt, m.point.completion, m.point.group_size, m.num_groups, m.num_steps]
        rows.append([*map(str, cells), f"{m.speedup['packed']:.3f}", f"{m.limit:.3f}"])
    return table(["Lp", "Lr", "G", "groups", "steps", "x packed", "limit"], rows)


def _sweep_table(sweep: Sequence[Measurement]) -> str:
    one = sweep[0].seconds["shared"] / sweep[0].num_groups
    rows = []
    for m in sweep:
        cost = m.seconds["shared"] / m.num_groups
        rows.append([str(m.point.group_size), f"{cost * 1e3:.0f}", f"{cost / one:.2f}", f"{m.speedup['packed']:.2f}",
                     f"{m.limit:.2f}", f"{m.utilisation:.3f}"])  # fmt: skip
    return table(["G", "ms a group", "x of G = 1", "x packed", "limit", "U"], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--quick", action="store_true", help="four points, in about a minute")
    parser.add_argument("--resume", type=Path, help="file that keeps finished points; those in it are not repeated")
    main(**vars(parser.parse_args()))
