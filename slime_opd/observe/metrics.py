"""Metrics that the driver computes: of a rollout's batch, and of a step's time."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from slime_opd import fields
from slime_opd.metrics import Maximum, Mean, Metric, Replicated, Total
from slime_opd.types import RolloutBatch


def masked_mean(array: np.ndarray, mask: np.ndarray | None = None) -> Mean:
    """The mean of the entries in `mask` (bool, of the array's shape; None: all) that are not NaN."""
    valid = ~np.isnan(array) if mask is None else mask & ~np.isnan(array)
    return Mean(float(array[valid].sum(dtype=np.float64)), float(valid.sum()))


def batch_metrics(batch: RolloutBatch) -> dict[str, Metric]:
    """A rollout's metrics: means of the fields that the field table logs, response lengths, and token counts.

    Means over response tokens are over those with loss_mask 1; missing values (NaN) are in no denominator. Off-policy
    responses are in the token counts only.
    """
    mask = batch.columns["loss_mask"]
    counts: dict[str, Metric] = {
        "rollout/trained_tokens": Total(float((mask > 0).sum())),
        "rollout/masked_tokens": Total(float((mask <= 0).sum())),
    }
    if "teacher_failed" in batch.columns:
        counts["opd/teacher_fallback_fraction"] = masked_mean(batch.columns["teacher_failed"])
    if "off_policy" in batch.columns:
        counts["rollout/off_policy_ratio"] = masked_mean(batch.columns["off_policy"])
        batch = batch.select(np.flatnonzero(batch.columns["off_policy"] == 0))
    trained = batch.columns["loss_mask"] > 0
    metrics: dict[str, Metric] = {
        "rollout/response_length": masked_mean(batch.response_lengths.astype(np.float64)),
        "rollout/response_length_max": Maximum(float(batch.response_lengths.max(initial=0))),
    }
    for row in fields.TABLE:
        if row.logged_as is not None and row.name in batch.columns:
            mask = trained if row.level == fields.RESPONSE else None
            metrics[row.logged_as] = masked_mean(batch.columns[row.name], mask)
    return metrics | counts


# Of Rollout.timings, and what the run adds to them.
_TIME_METRICS = {
    "update_weights": "perf/update_weights_time",
    "rollout": "perf/rollout_time",
    "train": "perf/train_time",
    "evaluate": "perf/evaluate_time",
}


def time_metrics(timings: Mapping[str, float]) -> dict[str, Metric]:
    """Seconds of each stage, by its metric's name."""
    return {_TIME_METRICS[stage]: Replicated(seconds) for stage, seconds in timings.items()}


def speed_metrics(timings: Mapping[str, float], num_tokens: int) -> dict[str, Metric]:
    """Seconds of each stage of a step and of all of them, and the step's tokens per second."""
    seconds = sum(timings.values())
    speed = {"perf/step_time": Replicated(seconds), "perf/tokens_per_second": Replicated(num_tokens / seconds)}
    return time_metrics(timings) | speed
