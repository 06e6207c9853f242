"""`raygrpo check`: everything that can be said of a run without starting it, as tables."""

from __future__ import annotations

import logging
import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from raygrpo.config import RunConfig
from raygrpo.console import print_preset
from raygrpo.placement import missing_nodes, one_machine_problems
from raygrpo.prepare import PreparedRun, prepare, required_resources
from raygrpo.rewards import RewardCheck, check_rewards
from raygrpo.sizing import GIB, ModelSize, RoleMemory, memory, misfits, object_store_bytes

NUM_SHOWN_PROMPTS = 2
NUM_REWARD_SAMPLES = 16


def check(config: RunConfig, config_dir: str | Path, console: Console | None = None) -> bool:
    """Validate data and rewards, print what a step will be made of; False when something would fail.

    Raises ValueError for what makes a run impossible.
    """
    console = console or Console()
    prepared = prepare(config, config_dir)
    rewards = check_rewards(
        config.reward, [prepared.prompts[i] for i in range(min(NUM_REWARD_SAMPLES, len(prepared.prompts)))],
        prepared.import_paths,
    )  # fmt: skip
    problems = resource_problems(config) + [
        f"reward {check.function}: {check.error}" for check in rewards if check.error
    ]
    console.print(_prompt_panels(prepared))
    console.print(_reward_table(rewards))
    console.print(_batch_table(batch_algebra(prepared)))
    console.print(_resource_table(config))
    size = ModelSize.of(prepared.model, config.model.lora, trust_remote_code=config.model.trust_remote_code)
    needs = memory(config, size, int(prepared.prompts.num_prompt_tokens.max()))
    console.print(_memory_table(needs, size, object_store_bytes(config, size)))
    print_preset(config.algorithm, console)
    if not os.environ.get("RAY_ADDRESS"):  # it is this machine that must hold everything
        for misfit in misfits(needs, gpu_bytes=gpu_memory(), host_bytes=psutil.virtual_memory().total):
            console.print(f"warning: {misfit}", style="yellow", highlight=False, markup=False)
    for problem in problems:
        console.print(f"problem: {problem}", style="red", highlight=False, markup=False)
    if not problems:
        console.print("nothing speaks against this run", style="green")
    return not problems


def batch_algebra(prepared: PreparedRun) -> list[tuple[str, str, str]]:
    """(quantity, value, how it comes about) of a step and of the run. Tokens are for the mean prompt and the longest
    completions."""
    config = prepared.config
    learners, budget = config.learner.num_workers, config.learner.max_tokens
    completion = config.generator.sampling.max_tokens
    prompt = float(prepared.prompts.num_prompt_tokens.mean())
    longest_prompt = int(prepared.prompts.num_prompt_tokens.max())
    group_tokens = prompt + config.group_size * completion
    updates = config.algorithm.updates_per_step
    groups_each = config.groups_per_step // learners // config.algorithm.mini_batches
    if longest_prompt + config.group_size * completion <= budget:
        passes = math.ceil(groups_each / (budget // (longest_prompt + config.group_size * completion)))
        how = f"{groups_each} whole groups in streams of {budget:,} tokens"
    else:
        passes = groups_each * math.ceil(config.group_size / ((budget - longest_prompt) // completion))
        how = f"{groups_each} groups, each larger than {budget:,} tokens: their completions run in parts"
    epochs = config.num_steps * config.groups_per_step / len(prepared.prompts)
    size = config.group_size
    per_step = config.groups_per_step
    evaluation = _evaluation_algebra(prepared) if config.evaluates else []
    return [
        ("prompts in the data", f"{len(prepared.prompts):,}", f"seen {epochs:.2f} times in the run"),
        ("steps", f"{config.num_steps:,}", "num_steps"),
        ("groups a step", f"{per_step:,}", "groups_per_step, one prompt each"),
        ("completions a step", f"{per_step * size:,}", f"groups_per_step x group_size ({size})"),
        ("completions in all", f"{config.completions_per_step * config.num_steps:,}", ""),
        ("prompt tokens", f"{prompt:.0f}", f"mean; longest {longest_prompt}"),
        ("tokens encoded a step", f"{per_step * group_tokens:,.0f}", f"prompts once, completions of {completion}"),
        (
            "  were prompts repeated",
            f"{config.completions_per_step * (prompt + completion):,.0f}",
            f"{config.completions_per_step * (prompt + completion) / (per_step * group_tokens):.1f} times as many",
        ),
        ("micro-batches", f"<= {passes}", f"of a learner in an update: {how}"),
        ("updates a step", f"{updates}", "algorithm.epochs x algorithm.mini_batches"),
        ("updates in all", f"{config.num_steps * updates:,}", ""),
        ("staleness", f"<= {config.max_staleness}", "0: on-policy; more: generating overlaps learning"),
        ("groups in flight", f"{(config.max_staleness + 1) * per_step:,}", "(max_staleness + 1) x groups_per_step"),
        *evaluation,
    ]  # fmt: skip


def _evaluation_algebra(prepared: PreparedRun) -> list[tuple[str, str, str]]:
    config, evaluation = prepared.config, prepared.evaluation
    assert config.eval is not None and evaluation is not None
    times = sum(config.eval.due(version, config.num_steps) for version in range(config.num_steps + 1))
    start = "at the start, " * config.eval.at_start
    rows = [("evaluations", f"{times:,}", f"{start}every {config.eval.every} steps and at the end")]
    for part in evaluation.sets:
        num_prompts, samples, sampling = len(part.prompts), part.settings.samples, part.settings.sampling
        how = "greedy" if sampling.temperature == 0 else f"temperature {sampling.temperature:g}"
        rows.append(
            (
                f"  completions of {part.name}",
                f"{num_prompts * samples:,}",
                f"each time: {num_prompts:,} prompts x {samples}, {how}, up to {sampling.max_tokens} tokens",
            )
        )
    return rows


def available_gpus() -> int:
    """GPUs of this machine, without starting anything that would claim one."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())


def gpu_memory() -> float | None:
    """Bytes of this machine's smallest GPU, or None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True)
    return min((float(line) * 2**20 for line in listing.stdout.split()), default=None)


def resource_problems(config: RunConfig) -> list[str]:
    """What this machine lacks, where the run would start its own Ray on it; else what the cluster at RAY_ADDRESS
    lacks now (an autoscaler may still bring it)."""
    if os.environ.get("RAY_ADDRESS"):
        return missing_nodes(config, cluster_nodes())
    needed, there = required_resources(config).num_gpus, available_gpus()
    problems = one_machine_problems(config)
    if needed > there:
        problems.append(
            f"the run asks for {needed:g} GPUs, this machine has {there}: set RAY_ADDRESS to a cluster, or lower "
            "num_gpus"
        )
    return problems


def cluster_nodes() -> list[dict[str, Any]]:
    """The nodes of the cluster at RAY_ADDRESS. Raises ValueError when that does not answer."""
    import ray
    import ray.exceptions

    address = os.environ["RAY_ADDRESS"]
    if address.startswith("http"):
        raise ValueError(
            f"RAY_ADDRESS ({address}) is a dashboard's; a run takes that of the cluster, HOST:6379 or auto"
        )
    connected = not ray.is_initialized()
    try:
        if connected:
            ray.init(logging_level=logging.ERROR, log_to_driver=False)
        return ray.nodes()
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise ValueError(f"no Ray cluster answers at RAY_ADDRESS ({address}): {error}") from None
    finally:
        if connected:
            ray.shutdown()


def _prompt_panels(prepared: PreparedRun) -> Group:
    panels = []
    for i in range(min(NUM_SHOWN_PROMPTS, len(prepared.prompts))):
        prompt = prepared.prompts[i]
        title = f"prompt {i}: {len(prompt.prompt_ids)} tokens; answer {prompt.answer!r}"
        panels.append(Panel(Text(prompt.text), title=Text(title), title_align="left"))
    sets = prepared.evaluation.sets if prepared.evaluation is not None else []
    reports = [prepared.prompts.report, *(part.prompts.report for part in sets)]
    return Group(*panels, *(Text(str(report)) for report in reports))


def _reward_table(checks: list[RewardCheck]) -> Table:
    table = Table(title=f"Rewards, tried on {NUM_REWARD_SAMPLES} prompts", title_justify="left")
    for column in ("function", "of the reference answer", "of nothing", "ms a call", "error"):
        table.add_column(column)
    for row in checks:
        values = ["-" if value is None else f"{value:.3f}" for value in (row.reference, row.empty)]
        table.add_row(row.function, *values, f"{row.ms:.2f}", Text(row.error, style="red"))
    return table


def _batch_table(rows: list[tuple[str, str, str]]) -> Table:
    table = Table(title="What a step is made of", title_justify="left")
    table.add_column("quantity")
    table.add_column("value", justify="right")
    table.add_column("because")
    for row in rows:
        table.add_row(*row)
    return table


def _resource_table(config: RunConfig) -> Table:
    table = Table(title="Ray resources", title_justify="left")
    for column in ("role", "processes", "CPUs each", "GPUs each"):
        table.add_column(column, justify="left" if column == "role" else "right")
    generator, learner, reward = config.generator, config.learner, config.reward
    table.add_row(
        f"generator ({generator.engine})",
        str(generator.num_actors),
        f"{generator.num_cpus:g}",
        f"{generator.num_gpus:g}",
    )
    table.add_row(
        f"learner (ZeRO {learner.zero_stage})",
        str(learner.num_workers),
        f"{learner.num_cpus:g}",
        f"{learner.num_gpus:g}",
    )
    table.add_row("scorer", str(reward.num_workers), f"{reward.num_cpus:g}", "0")
    if config.evaluates:
        table.add_row("evaluator", "1", f"{reward.num_cpus:g}", "0")
    needed = required_resources(config)
    table.add_row("asked for", "", f"{needed.num_cpus:g}", f"{needed.num_gpus:g}", style="bold")
    table.add_row("on this machine", "", str(os.cpu_count()), str(available_gpus()), style="bold")
    return table


def _memory_table(needs: list[RoleMemory], size: ModelSize, store_bytes: float) -> Table:
    title = f"Memory of a process, estimated (P = {size.num_parameters:,}"
    title += f", T = {size.num_trained:,} trained" if size.num_trained < size.num_parameters else ", all trained"
    table = Table(title=title + ")", title_justify="left")
    for column in ("role", "part", "GiB", "because"):
        table.add_column(column, justify="right" if column == "GiB" else "left")
    for need in needs:
        where = {"GPU": need.device, "host": need.host} if need.num_gpus else {"host": (*need.host, *need.device)}
        for place, parts in where.items():
            for part in parts:
                when = "" if part.when == "always" else f" ({part.when})"
                table.add_row("", part.name + when, f"{part.num_bytes / GIB:.2f}", part.why)
            most = need.device_peak if place == "GPU" else need.host_peak
            count = f"{need.num_processes} x {need.role}"
            table.add_row(count, f"most at a time, {place}", f"{most / GIB:.2f}", "", style="bold")
    if store_bytes:
        why = "two published versions, where learners or generators run"
        table.add_row("node", "object store", f"{store_bytes / GIB:.2f}", why)
    return table
