"""Forward-only passes before the first optimizer step: reference, teacher and old-policy log-probs.

Reference and teacher come first, for all micro-batches, then the student: one model at a time is on the device, unless
--opd-teacher-resident keeps the teacher there.

Notation: R response tokens of the rank's share, H hidden size, K candidate ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slime_opd.algorithm.kl import kl_estimate
from slime_opd.config import Config
from slime_opd.head.output_layer import chunks
from slime_opd.head.settings import HeadSettings
from slime_opd.head.teacher_comparison import TeacherStates
from slime_opd.head.vocabulary import VocabularyShard, chunk_logits
from slime_opd.model import device
from slime_opd.trainer.heads import comparing_head
from slime_opd.trainer.micro_batch import MicroBatch
from slime_opd.trainer.model_pass import ModelPass
from slime_opd.trainer.snapshots import WeightSnapshots
from slime_opd.types import TrainBatch


@dataclass(frozen=True)
class TeacherLayer:
    """The Megatron teacher's output layer [V/tp, H], None if no distributions are compared, and the shared ids."""

    weight: Tensor | None
    shard: VocabularyShard | None


class Scorer:
    """Scores a rank's share of a rollout with every model whose log-probs or distributions the objective reads."""

    def __init__(
        self, config: Config, model_pass: ModelPass, snapshots: WeightSnapshots, teacher: TeacherLayer
    ) -> None:
        self._config, self._pass, self._snapshots, self._teacher = config, model_pass, snapshots, teacher

    def score(self, batch: TrainBatch, settings: HeadSettings) -> tuple[TrainBatch, TeacherStates | None]:
        """The batch with the scored columns, and the hidden states of a teacher whose distributions are compared.

        Before the last pipeline stage, the batch as it came.
        """
        states = None
        names = [name for name in ("reference", "teacher") if name in self._snapshots]
        if names:
            with self._snapshots.swapped_in(*names) as models:
                for name in models:
                    if name == "reference":
                        batch = self._score_reference(batch, settings)
                    else:
                        batch, states = self._score_teacher(batch, settings)
        return self._score_student(batch, settings, states), states

    def _score_reference(self, batch: TrainBatch, settings: HeadSettings) -> TrainBatch:
        def head(hidden: Tensor, micro_batch: MicroBatch) -> dict[str, Tensor]:
            return {"ref_log_probs": self._pass.log_probs(hidden, micro_batch, settings.temperature)[0]}

        return _with_columns(batch, self._pass.score(batch, head))

    def _score_teacher(self, batch: TrainBatch, settings: HeadSettings) -> tuple[TrainBatch, TeacherStates | None]:
        """The teacher's log-probs of the sampled tokens, or, where distributions are compared, its hidden states."""
        compares = settings.divergence is not None
        samples = settings.objective.penalty is not None or not compares
        states: Tensor | None = None

        def head(hidden: Tensor, micro_batch: MicroBatch) -> dict[str, Tensor]:
            nonlocal states
            columns = {}
            if samples:
                log_probs, _ = self._pass.log_probs(
                    hidden, micro_batch, settings.teacher_temperature, self._teacher.shard
                )
                columns["teacher_log_probs"] = log_probs
            if compares:
                if states is None:
                    states = _hidden_buffer(hidden, batch, on_host=self._config.opd.opd_teacher_hidden_on_host)
                # Later work of this stream comes after the copy, so nothing has to wait for it.
                states[micro_batch.rows].copy_(hidden, non_blocking=True)
            return columns

        columns = self._pass.score(batch, head)
        return _with_columns(batch, columns), None if states is None else TeacherStates(states, self._teacher.weight)

    def _score_student(self, batch: TrainBatch, settings: HeadSettings, states: TeacherStates | None) -> TrainBatch:
        """The columns of the policy that starts the rollout's first step, in one pass; no pass where there are none."""
        several_steps = self._config.scores_old_policy
        divergence = settings.divergence
        weighs_tokens = self._config.divergence.opd_token_weighting is not None
        fixes_candidates = several_steps and divergence is not None and divergence.kind == "token_reward_direct"
        if not (several_steps or weighs_tokens):
            return batch

        def head(hidden: Tensor, micro_batch: MicroBatch) -> dict[str, Tensor]:
            columns = {}
            at_teacher_temperature, entropies = self._pass.log_probs(
                hidden, micro_batch, settings.teacher_temperature, self._teacher.shard
            )
            if several_steps:
                columns["log_probs"] = at_teacher_temperature
                if settings.teacher_temperature != settings.temperature or self._teacher.shard != self._pass.shard:
                    columns["penalty_log_probs"] = at_teacher_temperature
                    columns["log_probs"] = self._pass.log_probs(hidden, micro_batch, settings.temperature)[0]
            if divergence is not None and (weighs_tokens or fixes_candidates):
                columns |= self._compare(hidden, micro_batch, settings, states, with_candidates=fixes_candidates)
            elif weighs_tokens:
                columns["student_entropy"] = entropies
                teacher_log_probs = micro_batch.columns["teacher_log_probs"]
                columns["token_divergence"] = kl_estimate(at_teacher_temperature, teacher_log_probs, kind="low_var_kl")
            return columns

        return _with_columns(batch, self._pass.score(batch, head))

    def _compare(
        self,
        hidden: Tensor,
        micro_batch: MicroBatch,
        settings: HeadSettings,
        states: TeacherStates | None,
        *,
        with_candidates: bool,
    ) -> dict[str, Tensor]:
        """Entropy and divergence of each token, and the candidates as the policy has them before the first step."""
        head = comparing_head(self._pass, micro_batch, settings, states, self._teacher.shard)
        weight, parts = self._pass.model.output_weight(), []
        for rows in chunks(len(hidden), self._pass.chunk_size):
            entropies, side = head.compare(chunk_logits(hidden[rows], weight, self._pass.shard), rows)
            comparison = side.comparison
            # A response that the teacher did not score has no divergence: it is compared with itself there.
            divergence = comparison.reverse_kl.clamp(min=0).masked_fill(comparison.scored == 0, torch.nan)
            part = {"student_entropy": entropies, "token_divergence": divergence}
            if with_candidates:
                over = comparison.candidates
                part["candidate_ids"] = torch.where(over.valid, side.ids, -1)
                part["candidate_log_probs"] = over.log_p.detach()
                part["candidate_teacher_log_probs"] = over.log_q
            parts.append(part)
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _hidden_buffer(hidden: Tensor, batch: TrainBatch, *, on_host: bool) -> Tensor:
    """Memory for the hidden states [R, H] of a batch's response tokens; joining parts would need it twice.

    On the device of `hidden`, a micro-batch's, or in pinned memory of the host, to and from which copies need not wait.
    """
    shape = (int(batch.samples.response_lengths.sum()), hidden.shape[1])
    if on_host:
        return torch.empty(shape, dtype=hidden.dtype, pin_memory=device.has_cuda())
    return torch.empty(shape, dtype=hidden.dtype, device=hidden.device)


def _with_columns(batch: TrainBatch, columns: dict[str, Tensor]) -> TrainBatch:
    return batch.with_columns({name: _as_numpy(values) for name, values in columns.items()})


def _as_numpy(values: Tensor) -> np.ndarray:
    return (values.float() if values.is_floating_point() else values).cpu().numpy()
