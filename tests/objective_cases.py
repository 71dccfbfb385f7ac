"""The implementation's side of `brute_force`: a case as the chunked pass takes it."""

from __future__ import annotations

from typing import Any

import torch
from brute_force import VOCABULARY, Case
from torch import Tensor

from slime_opd.distill.comparison import DivergenceOptions
from slime_opd.distill.penalty import PenaltyOptions, clamp_signal, sampled_reverse_kl, subtract_penalty
from slime_opd.head.objective_head import ObjectiveHead
from slime_opd.head.output_layer import chunked_objective
from slime_opd.head.settings import HeadSettings
from slime_opd.head.teacher_comparison import TeacherStates
from slime_opd.head.vocabulary import VocabularyShard
from slime_opd.objective.options import PolicyOptions
from slime_opd.objective.streams import Objective
from slime_opd.objective.tokens import TokenColumns

METRICS_TOP_K = 4


def settings_of(case: Case) -> HeadSettings:
    """How chunks of the case are scored."""
    policy = PolicyOptions(
        **case.policy,
        penalty=None if case.penalty is None else PenaltyOptions(**case.penalty),
        penalty_in_step=not subtracts_before_steps(case),
        divergence=None if case.divergence is None else DivergenceOptions(**case.divergence),
    )
    return HeadSettings(policy, case.temperature, case.teacher_temperature, case.top_k, METRICS_TOP_K)


def subtracts_before_steps(case: Case) -> bool:
    """Whether the penalty is of the rollout's first policy, whose log-probs are a scored column."""
    return case.penalty is not None and case.later_step and not case.penalty.get("refresh_student", False)


def columns_of(case: Case, given: dict[str, Any], rows: slice) -> TokenColumns:
    """The assembled columns of the tokens `rows`: the advantages hold the penalty where its log-probs are a column."""
    columns = {name: values[rows] for name, values in given["columns"].items()}
    if subtracts_before_steps(case):
        teacher = (
            columns["teacher_log_probs"] if "teacher_log_probs" in columns else teacher_log_probs(case, given, rows)
        )
        signal, _ = clamp_signal(sampled_reverse_kl(columns["log_probs"], teacher), case.penalty.get("clamp"))
        columns["advantages"] = subtract_penalty(
            columns["advantages"],
            signal,
            columns["policy_weights"],
            coefficient=case.penalty["coefficient"],
            weights=columns["penalty_weights"],
        )
    return TokenColumns.from_mapping(columns)


def teacher_log_probs(case: Case, given: dict[str, Any], rows: slice) -> Tensor:
    """A Megatron teacher's log-probs of the targets, as its forward pass scores them."""
    weight = given["full_teacher_weight"] if "full_teacher_weight" in given else given["teacher_weight"]
    logits = given["teacher_hidden"][rows] @ weight[:VOCABULARY].T / case.teacher_temperature
    return logits.log_softmax(dim=1).gather(1, given["targets"][rows, None])[:, 0]


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
    columns = columns_of(case, given, rows)
    shard = shard or VocabularyShard(0, VOCABULARY)
    head = ObjectiveHead(settings_of(case), shard, given["targets"][rows], columns, teacher)
    return chunked_objective(hidden[rows], weight, shard, head, chunk_size)


def values_and_gradients(objective: Objective, hidden: Tensor, weight: Tensor) -> list[Tensor]:
    """Loss, and its gradients wrt hidden and weight."""
    return [objective.loss.detach(), *torch.autograd.grad(objective.loss, (hidden, weight))]
