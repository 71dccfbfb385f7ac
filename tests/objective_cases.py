"""The implementation's side of `brute_force`: a case as the chunked pass takes it."""

from __future__ import annotations

from typing import Any

import torch
from brute_force import VOCABULARY, Case
from torch import Tensor

from slime_opd.distill.comparison import DivergenceOptions
from slime_opd.head.objective_head import HeadSettings, ObjectiveHead, TeacherStates
from slime_opd.head.output_layer import chunked_objective
from slime_opd.head.vocabulary import VocabularyShard
from slime_opd.objective.objective import Objective, PenaltyOptions, PolicyOptions

METRICS_TOP_K = 4


def settings_of(case: Case) -> HeadSettings:
    """How chunks of the case are scored."""
    policy = PolicyOptions(
        **case.policy,
        penalty=None if case.penalty is None else PenaltyOptions(**case.penalty),
        divergence=None if case.divergence is None else DivergenceOptions(**case.divergence),
    )
    return HeadSettings(policy, case.temperature, case.teacher_temperature, case.top_k, METRICS_TOP_K)


def objective_of(
    case: Case,
    given: dict[str, Any],
    hidden: Tensor,
    weight: Tensor,
    *,
    chunk_size: int = 4,
    shard: VocabularyShard | None = None,
    rows: slice = slice(None),
) -> Objective:
    """The objective of the tokens `rows`; with a shard, `weight` and the teacher's are this rank's rows."""
    teacher = None
    if case.divergence is not None and not case.remote:
        first = 0 if shard is None else shard.start
        teacher = TeacherStates(
            given["teacher_hidden"][rows], given["teacher_weight"][first : first + len(weight)].contiguous()
        )
    columns = {name: values[rows] for name, values in given["columns"].items()}
    shard = shard or VocabularyShard(0, VOCABULARY)
    head = ObjectiveHead(settings_of(case), shard, given["targets"][rows], columns, teacher)
    return chunked_objective(hidden[rows], weight, shard, head, chunk_size)


def values_and_gradients(objective: Objective, hidden: Tensor, weight: Tensor) -> list[Tensor]:
    """Loss, and its gradients wrt hidden and weight."""
    return [objective.loss.detach(), *torch.autograd.grad(objective.loss, (hidden, weight))]
