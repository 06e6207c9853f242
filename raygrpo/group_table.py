"""Groups as Arrow tables: what Ray Data carries between the stages of the stream."""

from __future__ import annotations

import pyarrow as pa

from raygrpo.types import (
    RolloutGroup,
    ScoredGroup,
    group_to_row,
    row_to_group,
    row_to_scored_group,
    scored_group_to_row,
)

PROMPT_TYPE = pa.struct(
    [
        ("prompt_id", pa.int64()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("text", pa.string()),
        ("answer", pa.string()),  # JSON
        ("row", pa.string()),  # JSON
    ]
)
ROLLOUT_TYPE = pa.struct(
    [
        ("completion_ids", pa.list_(pa.int32())),
        ("behaviour_logprobs", pa.list_(pa.float32())),
        ("finish_reason", pa.string()),
        ("text", pa.string()),
        ("end_s", pa.float64()),
    ]
)
REWARD_TYPE = pa.struct(
    [
        ("total", pa.float64()),
        ("components", pa.list_(pa.float64())),
        ("rationales", pa.list_(pa.string())),
        ("error", pa.string()),
    ]
)
GROUP_SCHEMA = pa.schema(
    [
        ("ticket", pa.int64()),
        ("prompt", PROMPT_TYPE),
        ("policy_version", pa.int64()),
        ("rollouts", pa.list_(ROLLOUT_TYPE)),
        ("generator", pa.string()),
        ("generate_start_s", pa.float64()),
        ("generate_end_s", pa.float64()),
        ("error", pa.string()),
        ("replacement", pa.int64()),
        ("attempt", pa.int64()),
    ]
)
SCORED_GROUP_SCHEMA = pa.schema(
    [
        ("group", pa.struct(list(GROUP_SCHEMA))),
        ("rewards", pa.list_(REWARD_TYPE)),
        ("score_start_s", pa.float64()),
        ("score_end_s", pa.float64()),
    ]
)


def groups_to_table(groups: list[RolloutGroup]) -> pa.Table:
    return pa.Table.from_pylist([group_to_row(group) for group in groups], schema=GROUP_SCHEMA)


def table_to_groups(table: pa.Table) -> list[RolloutGroup]:
    return [row_to_group(row) for row in table.to_pylist()]


def scored_groups_to_table(groups: list[ScoredGroup]) -> pa.Table:
    return pa.Table.from_pylist([scored_group_to_row(group) for group in groups], schema=SCORED_GROUP_SCHEMA)


def table_to_scored_groups(table: pa.Table) -> list[ScoredGroup]:
    return [row_to_scored_group(row) for row in table.to_pylist()]
