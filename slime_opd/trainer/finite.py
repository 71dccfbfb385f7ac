"""Optimizer steps whose loss or gradient is not finite: detected on all ranks alike, skipped, counted, bounded.

A skipped step leaves weights, optimizer state and learning-rate schedule as they were. The decision is one collective
over the world, so that no rank can step alone.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from slime_opd import fields
from slime_opd.errors import NonFiniteError
from slime_opd.model import device
from slime_opd.types import RolloutBatch, TrainBatch

logger = logging.getLogger(__name__)

# Why a step was skipped. An overflow is float16's: the loss scale was too large, and is lower for the next step.
Cause = Literal["loss", "gradient", "overflow"]

# Gradients may be finite while Megatron's float32 sum of their squares is not. Half of the exponent range is left for
# that sum.
_LARGEST_SQUARED_NORM = 1e36
# A value past this has a square that float32 cannot hold, or soon will not.
_LARGEST_VALUE = 1e15
_MAX_DESCRIBED = 3


def non_finite(losses: Sequence[Tensor], gradients: Sequence[Tensor]) -> Cause | None:
    """Which is not finite on any rank: "loss", "gradient" or None. A collective; every rank gets the same answer.

    losses: scalars, this rank's micro-batches (none before the last stage); gradients: this rank's buffers, reduced.
    """
    totals = torch.zeros(2, dtype=torch.float64, device=device.device())
    if losses:
        totals[0] = (~torch.stack([loss.detach().float() for loss in losses]).isfinite()).sum()
    for gradient in gradients:
        totals[1] += torch.linalg.vector_norm(gradient, dtype=torch.float32).double().square()
    dist.all_reduce(totals)
    bad_losses, squared_norm = totals.tolist()
    if bad_losses:
        return "loss"
    # A comparison with NaN is false.
    return None if squared_norm < _LARGEST_SQUARED_NORM else "gradient"


class SkippedSteps:
    """Counts skipped steps, by cause, and stops at too many in a row.

    limit: skipped steps in a row that are tolerated; None: any number. Overflows are neither counted in it nor end a
    row.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._rollout_counts: Counter[str] = Counter()
        self.in_a_row = 0

    def start_rollout(self) -> None:
        """Count a rollout's steps from 0; the row goes on."""
        self._rollout_counts.clear()

    def note(self, cause: Cause | None, describe: Callable[[], str] = str) -> None:
        """Note a step that was taken (None) or skipped; `describe` names what was not finite, and may be a collective.

        Raises NonFiniteError past the limit.
        """
        if cause is None:
            self.in_a_row = 0
            return
        self._rollout_counts[cause] += 1
        if cause == "overflow":
            return
        self.in_a_row += 1
        details = describe()
        problem = f"the {cause} is not finite" + (f" ({details})" if details else "")
        if self._limit is not None and self.in_a_row > self._limit:
            raise NonFiniteError(
                f"{problem}, in {self.in_a_row} optimizer steps in a row (--max-skipped-steps {self._limit}); these steps were skipped, so the weights are finite: "
                "check that sample, its reward and its teacher's scores, lower --lr or --clip-grad, or continue from an earlier checkpoint with --ckpt-step"
            )
        if dist.get_rank() == 0:
            logger.warning(
                "an optimizer step was skipped, weights are unchanged: %s; %d in a row, the run stops after %s",
                problem,
                self.in_a_row,
                "any number" if self._limit is None else self._limit,
            )

    def counts(self) -> dict[str, float]:
        """Metrics of the rollout so far."""
        return {
            "train/skipped_steps": float(self._rollout_counts.total()),
            "train/skipped_steps/loss": float(self._rollout_counts["loss"]),
            "train/skipped_steps/gradient": float(self._rollout_counts["gradient"]),
            "train/skipped_steps/overflow": float(self._rollout_counts["overflow"]),
            "train/skipped_in_a_row": float(self.in_a_row),
        }


def describe_step(batch: TrainBatch, step: int, losses: Sequence[Tensor]) -> str:
    """Where a step's non-finite numbers come from, as far as any rank can tell. A collective."""
    own = _suspects(batch, step, [float(loss) for loss in losses])
    rank_lines: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(rank_lines, own)
    # Tensor-parallel ranks hold the same samples. What names a value comes before what names a micro-batch.
    lines = list(dict.fromkeys(line for values, _ in rank_lines for line in values))
    lines = lines or list(dict.fromkeys(line for _, micro_batches in rank_lines for line in micro_batches))
    more = len(lines) - _MAX_DESCRIBED
    return "; ".join(lines[:_MAX_DESCRIBED]) + (f"; and {more} more" if more > 0 else "")


def _suspects(batch: TrainBatch, step: int, losses: Sequence[float]) -> tuple[list[str], list[str]]:
    """Of one rank: its samples' values that no loss can be made of, and the micro-batches whose loss is not finite."""
    values: list[str] = []
    micro_batches: list[str] = []
    start = sum(sum(sizes) for sizes in batch.steps[:step])
    for number, size in enumerate(batch.steps[step]):
        samples = batch.samples.select(np.arange(start, start + size))
        start += size
        values += unusable_values(samples)
        if number < len(losses) and not np.isfinite(losses[number]):
            prompts = ", ".join(_name(samples, index) for index in range(min(len(samples), _MAX_DESCRIBED)))
            micro_batches.append(f"in the micro-batch of {prompts}" + (", …" if len(samples) > _MAX_DESCRIBED else ""))
    return values, micro_batches


def unusable_values(samples: RolloutBatch) -> list[str]:
    """The first value of each column and sample that is infinite, huge, or NaN where a column may not be, of trained
    tokens.
    """
    columns = samples.columns
    weights = [columns[name] for name in ("policy_weights", "divergence_base") if name in columns]
    # A weight of NaN is itself a fault, so: not 0.
    trained = np.any([weight != 0 for weight in weights], axis=0) if weights else None
    owner = np.repeat(np.arange(len(samples)), samples.response_lengths)
    first = np.cumsum(samples.response_lengths) - samples.response_lengths
    problems = []
    for name, array in columns.items():
        row = fields.field(name)
        if row.level != fields.RESPONSE or row.wide or not np.issubdtype(array.dtype, np.floating):
            continue
        bad = np.abs(array) > _LARGEST_VALUE
        bad |= np.isnan(array) & (not row.may_be_nan)
        if trained is not None:
            bad &= trained
        indices = np.flatnonzero(bad)
        for sample, first_index in zip(*np.unique(owner[indices], return_index=True), strict=True):
            token = int(indices[first_index])
            problems.append(
                f"{_name(samples, int(sample))}: {name} is {array[token]:g} at response token {token - int(first[sample])}"
            )
    return problems


def _name(samples: RolloutBatch, index: int) -> str:
    group = samples.columns.get("group")
    return f"a sample of {len(samples)}" if group is None else f"prompt {int(group[index])}"
