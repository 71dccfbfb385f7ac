"""Making the head of a micro-batch: its settings, its typed columns, and the terms that need whole responses.

Notation: R response tokens of the micro-batch, H hidden size.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from slime_opd.config import Config
from slime_opd.head.objective_head import ObjectiveHead
from slime_opd.head.settings import HeadSettings
from slime_opd.head.teacher_comparison import TeacherStates
from slime_opd.head.vocabulary import VocabularyShard
from slime_opd.objective.options import PolicyOptions, objective_options
from slime_opd.objective.responses import needs_whole_responses, response_columns
from slime_opd.objective.tokens import TokenColumns
from slime_opd.trainer.micro_batch import MicroBatch
from slime_opd.trainer.model_pass import ModelPass


def head_settings(config: Config, progress: float) -> HeadSettings:
    """How chunks are scored when `progress` (0 to 1) of the run's rollouts are done."""
    temperature = config.rollout.rollout_temperature
    return HeadSettings(
        objective_options(config, progress),
        temperature,
        config.teacher_temperature if config.opd.use_opd else temperature,
        top_k=config.divergence.opd_log_prob_top_k,
        metrics_top_k=config.divergence.opd_metrics_top_k,
    )


def make_head(
    model_pass: ModelPass,
    micro_batch: MicroBatch,
    settings: HeadSettings,
    hidden: Tensor,
    teacher: TeacherStates | None,
    teacher_shard: VocabularyShard | None,
) -> ObjectiveHead:
    """The objective of a micro-batch whose predicting hidden states are `hidden` [R, H].

    `teacher`: the hidden states of the rank's whole share. `teacher_shard`: the vocabulary that both models have.
    """
    columns, options = TokenColumns.from_mapping(micro_batch.columns), settings.objective
    if isinstance(options, PolicyOptions) and needs_whole_responses(options):
        # The head sees chunks, which cut responses.
        log_probs, _ = model_pass.log_probs(hidden.detach(), micro_batch, settings.teacher_temperature, teacher_shard)
        columns = response_columns(columns, log_probs, micro_batch.response_lengths, options)
    return comparing_head(model_pass, micro_batch, settings, teacher, teacher_shard, columns)


def comparing_head(
    model_pass: ModelPass,
    micro_batch: MicroBatch,
    settings: HeadSettings,
    teacher: TeacherStates | None,
    teacher_shard: VocabularyShard | None,
    columns: TokenColumns | None = None,
) -> ObjectiveHead:
    """The head of a micro-batch, by default with the columns that it has before the rollout is assembled."""
    if columns is None:
        columns = TokenColumns.from_mapping(micro_batch.columns)
    if teacher is not None:
        teacher = replace(teacher, hidden=teacher.hidden[micro_batch.rows])
    return ObjectiveHead(settings, model_pass.shard, micro_batch.targets, columns, teacher, teacher_shard)
