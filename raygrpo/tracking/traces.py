"""A sampled group as an MLflow trace: what was asked, what each completion said, when, and what every reward gave.

    group (prompt in, statistics out)
      completion 0 (text, tokens, finish reason; feedback: each reward component, the total)
        exact_match (completion and answer in, score out)
        ...
      completion 1 ...

The prompt is the session, so that the UI lists what became of one prompt over the course of training; the reference
answer is the trace's expectation. Ids follow from run, step and ticket: a trace that is delivered twice, or trained
again after a resume, is replaced. Completions begin with their group and end when each was complete; rewards have the
times at which the group was scored.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raygrpo.tracking.journal import Item
from raygrpo.types import ScoredGroup

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Assessment, AssessmentSource, Span

ROOT_ATTRIBUTES = ("step", "ticket", "prompt_id", "num_prompt_tokens", "policy_version", "generator")
PREVIEW = 1000  # characters of prompt and completion in the list of traces


def group_trace(
    step: int, why: str, scored: ScoredGroup, advantages: list[float], components: dict[str, float]
) -> Item:
    """The group as an item for the spool.

    advantages: one per rollout. components: the reward functions' names and weights, in order.
    """
    group, prompt = scored.group, scored.group.prompt
    rollouts = [
        {
            "text": rollout.text,
            "num_tokens": len(rollout.completion_ids),
            "finish_reason": rollout.finish_reason,
            "end_s": rollout.end_s,
            "mean_logprob": readable(statistics.fmean(rollout.behaviour_logprobs or [0.0])),
            "reward": None if reward.error else readable(reward.total),
            "components": dict(zip(components, map(readable, reward.components), strict=True)),
            "rationales": dict(zip(components, reward.rationales or [""] * len(components), strict=True)),
            "error": reward.error,
            "advantage": readable(advantage),
        }
        for rollout, reward, advantage in zip(group.rollouts, scored.rewards, advantages, strict=True)
    ]
    return {
        "kind": "trace",
        "step": step,
        "why": why,
        "ticket": group.ticket,
        "prompt_id": prompt.prompt_id,
        "prompt": prompt.text,
        "num_prompt_tokens": len(prompt.prompt_ids),
        "answer": prompt.answer,
        "policy_version": group.policy_version,
        "generator": group.generator,
        "error": group.error,
        "generate_s": [group.generate_start_s, group.generate_end_s],
        "score_s": [scored.score_start_s, scored.score_end_s],
        "weights": components,
        "rollouts": rollouts,
    }


def deliver_trace(client: MlflowClient, experiment_id: str, run_id: str, item: Item) -> None:
    """Write the trace. MLflow's fluent API would send it in the background and drop it where the server is away."""
    from mlflow.entities import TraceInfo, TraceLocation, TraceState
    from mlflow.tracing.client import TracingClient
    from mlflow.tracing.constant import TraceMetadataKey, TraceTagKey

    trace = _TraceBuilder(run_id, item)
    spans = trace.spans()
    tracing = TracingClient(client.tracking_uri)
    tracing.log_spans(experiment_id, spans)
    start_s, end_s = trace.start_s, trace.end_s
    tracing.start_trace(
        TraceInfo(
            trace_id=trace.trace_id,
            trace_location=TraceLocation.from_experiment_id(experiment_id),
            request_time=round(start_s * 1e3),
            execution_duration=round((end_s - start_s) * 1e3),
            state=TraceState.ERROR if item["error"] else TraceState.OK,
            request_preview=_shortened(item["prompt"]),
            response_preview=_shortened(_best(item)["text"] if item["rollouts"] else item["error"]),
            client_request_id=f"step {item['step']}, ticket {item['ticket']}",
            trace_metadata={
                TraceMetadataKey.SOURCE_RUN: run_id,
                TraceMetadataKey.TRACE_SESSION: f"#{item['prompt_id']} of run {run_id[:8]}",
            },
            tags={
                TraceTagKey.TRACE_NAME: f"step {item['step']}: {item['why']} group",
                "step": str(item["step"]),
                "group": item["why"],
                "policy_version": str(item["policy_version"]),
            },
            assessments=trace.assessments(),
        )
    )


class _TraceBuilder:
    """The spans and assessments of one item, with ids that follow from it."""

    def __init__(self, run_id: str, item: Item) -> None:
        self.item = item
        self.run_id = run_id
        self.trace_id = "tr-" + _hash(f"{run_id}/{item['step']}/{item['ticket']}")
        self.start_s = item["generate_s"][0]
        self.end_s = max(item["score_s"][1], item["generate_s"][1], self.start_s)

    def spans(self) -> list[Span]:
        item = self.item
        rewards = [rollout["reward"] for rollout in item["rollouts"] if rollout["reward"] is not None]
        outputs: dict[str, Any] = {"error": item["error"]} if item["error"] else {}
        if rewards:
            outputs |= {
                "best_completion": _best(item)["text"],
                "reward_mean": readable(statistics.fmean(rewards)),
                "reward_std": readable(statistics.stdev(rewards) if len(rewards) > 1 else 0.0),
                "rewards": [rollout["reward"] for rollout in item["rollouts"]],
                "advantages": [rollout["advantage"] for rollout in item["rollouts"]],
                "num_tokens": [rollout["num_tokens"] for rollout in item["rollouts"]],
            }
        attributes = {key: item[key] for key in ROOT_ATTRIBUTES}
        inputs = {"prompt": item["prompt"], "answer": item["answer"]}
        times_s = (self.start_s, self.end_s)
        spans = [self._span("group", "group", None, "CHAIN", times_s, inputs, outputs, attributes, item["error"])]
        for i, rollout in enumerate(item["rollouts"]):
            spans += self._completion_spans(i, rollout)
        return spans

    def _completion_spans(self, i: int, rollout: dict[str, Any]) -> list[Span]:
        item = self.item
        tokens = {"input_tokens": item["num_prompt_tokens"], "output_tokens": rollout["num_tokens"]}
        attributes = {
            "mlflow.chat.tokenUsage": tokens | {"total_tokens": sum(tokens.values())},
            "reward": rollout["reward"],
            "advantage": rollout["advantage"],
            "mean_logprob": rollout["mean_logprob"],
        }
        outputs = {"completion": rollout["text"], "finish_reason": rollout["finish_reason"]}
        key, name = f"completion {i}", f"completion {i}: reward {_short(rollout['reward'])}"
        times_s = (item["generate_s"][0], rollout["end_s"])
        spans = [self._span(key, name, "group", "LLM", times_s, {"sample": i}, outputs, attributes, "")]
        for component, score in rollout["components"].items():
            inputs = {"completion": rollout["text"], "answer": item["answer"]}
            output = {"score": score, "weight": item["weights"][component]}
            output |= {"rationale": said} if (said := rollout["rationales"][component]) else {}
            name, times_s = f"{key}/{component}", item["score_s"]
            spans.append(self._span(name, component, key, "EVALUATOR", times_s, inputs, output, {}, rollout["error"]))
        return spans

    def assessments(self) -> list[Assessment]:
        """The answer as expectation; each completion's components, unweighted, and its total reward as feedback."""
        from mlflow.entities import AssessmentSource, Expectation

        item = self.item

        def source(name: str) -> AssessmentSource:
            return AssessmentSource(source_type="CODE", source_id=name)

        assessments: list[Assessment] = []
        if item["answer"] is not None:
            answer = item["answer"] if isinstance(item["answer"], str) else json.dumps(item["answer"])
            assessments.append(Expectation("answer", answer, source=source("data")))
        for i, rollout in enumerate(item["rollouts"]):
            span_id = self._span_id(f"completion {i}")
            for component, score in rollout["components"].items():
                weight = item["weights"][component]
                said = rollout["rationales"][component] or f"{component} gave {_short(score)}"
                rationale = f"completion {i}: {said} (counts {weight:g} x)"
                assessments.append(_feedback(component, score, rollout["error"], source(component), span_id, rationale))
            rationale = f"completion {i}: weighted sum; advantage within its group {_short(rollout['advantage'])}"
            total = rollout["reward"]
            assessments.append(_feedback("reward", total, rollout["error"], source("raygrpo"), span_id, rationale))
        for number, assessment in enumerate(assessments):
            assessment.trace_id = self.trace_id
            assessment.assessment_id = "a-" + _hash(f"{self.trace_id}/assessment {number}")
            assessment.create_time_ms = assessment.last_update_time_ms = round(self.end_s * 1e3)
        return assessments

    def _span(
        self,
        key: str,
        name: str,
        parent: str | None,
        kind: str,
        times_s: Sequence[float],
        inputs: Any,
        outputs: Any,
        attributes: dict[str, Any],
        error: str,
    ) -> Span:
        from mlflow.entities import Span

        start_s, end_s = times_s
        values = {"mlflow.traceRequestId": self.trace_id, "mlflow.spanType": kind}
        values |= {"mlflow.spanInputs": inputs, "mlflow.spanOutputs": outputs}
        return Span.from_dict(
            {
                "trace_id": self.trace_id,
                "span_id": self._span_id(key),
                "parent_span_id": self._span_id(parent) if parent else None,
                "name": name,
                "start_time_unix_nano": round(start_s * 1e9),
                "end_time_unix_nano": round(max(end_s, start_s) * 1e9),
                "attributes": {key: json.dumps(value) for key, value in (values | attributes).items()},
                "status": {"code": "STATUS_CODE_ERROR" if error else "STATUS_CODE_OK", "message": error},
                "events": [],
            }
        )

    def _span_id(self, key: str) -> str:
        return _hash(f"{self.trace_id}/{key}")[:16]


def _hash(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def readable(value: float) -> float | None:
    """As people read it (six decimals); None where it is not finite, which is no JSON."""
    return round(value, 6) if math.isfinite(value) else None


def _best(item: Item) -> dict[str, Any]:
    return max(item["rollouts"], key=lambda rollout: rollout["reward"] or 0.0)


def _short(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"


def _feedback(
    name: str, value: float | None, error: str, source: AssessmentSource, span_id: str, rationale: str
) -> Assessment:
    from mlflow.entities import Feedback

    error = error or ("not a finite number" if value is None else "")
    return Feedback(name, value, error=error or None, source=source, span_id=span_id, rationale=rationale)


def _shortened(text: str) -> str:
    return text if len(text) <= PREVIEW else text[: PREVIEW - 3] + "..."
