"""One trainer rank: the verbs of a run.

A Trainer owns its rank's part of the model, the optimizer, and the host copies of reference and teacher. It is given
TrainBatches and columns, and returns columns and metrics; it is free of Ray, HTTP and rollouts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from slime_opd.checkpoint import directory
from slime_opd.checkpoint.atomic import replace_directory
from slime_opd.checkpoint.formats import torch_dist_to_hf
from slime_opd.checkpoint.formats.architecture import vocabulary_rows
from slime_opd.checkpoint.formats.load import load_training_state
from slime_opd.checkpoint.formats.save import save
from slime_opd.checkpoint.formats.state import TrainingState
from slime_opd.checkpoint.formats.verification import Verification
from slime_opd.config import Config
from slime_opd.config.training_stages import CheckpointConfig
from slime_opd.head.output_layer import chunked_objective
from slime_opd.head.settings import HeadSettings
from slime_opd.head.teacher_comparison import TeacherStates
from slime_opd.head.vocabulary import VocabularyShard
from slime_opd.metrics import Concentration, Mean, Metric, Replicated, Total
from slime_opd.model import parallel
from slime_opd.model.bridge import make_bridge
from slime_opd.model.builder import build_model
from slime_opd.model.hidden_states import HiddenStatesModel
from slime_opd.model.transformer_config import kernels
from slime_opd.model.vocabulary import vocabulary_shard
from slime_opd.objective.streams import Objective
from slime_opd.trainer import finite
from slime_opd.trainer.loading import Fingerprint, ModelLoader, Source, student_source
from slime_opd.trainer.micro_batch import MicroBatch
from slime_opd.trainer.model_pass import ModelPass
from slime_opd.trainer.optimizer import (
    finish_gathering_weights,
    gradients,
    group_settings,
    loss_scale_can_fall,
    make_scheduler,
    restore_settings,
    wrap,
)
from slime_opd.trainer.roles import ROLES, Role
from slime_opd.trainer.scoring import Scorer, TeacherLayer
from slime_opd.trainer.snapshots import WeightSnapshots
from slime_opd.types import StartReport, TrainBatch
from slime_opd.weights.gathered_weights import GatheredWeights


class Trainer:
    """One rank of a trainer group. Every method is called on all ranks together."""

    def __init__(
        self, config: Config, *, rank: int, world_size: int, init_method: str, role: Role = ROLES["actor"]
    ) -> None:
        self.config, self._role = config, role
        self.layout = parallel.initialize(
            config.parallel,
            rank=rank,
            world_size=world_size,
            init_method=init_method,
            seed=config.training.seed,
            timeout_minutes=config.training.distributed_timeout_minutes,
        )
        self.bridge = make_bridge(config)
        self.model: HiddenStatesModel = build_model(config, self.bridge)
        self.snapshots = WeightSnapshots(self.model)
        self.shard: VocabularyShard | None = None
        if self.layout.is_last_stage:
            self.shard = vocabulary_shard(self.model.output_weight(), self.bridge.vocab_size)
        # None where the user turned Megatron's check off.
        self._checks_finite = config.megatron.check_for_nan_in_grad is not False
        self._gathered_weights: GatheredWeights | None = None
        self.skipped = finite.SkippedSteps(config.training.max_skipped_steps if self._checks_finite else None)
        self._batch: TrainBatch | None = None
        self._teacher_states: TeacherStates | None = None
        with self._waiting_for_files():
            self.start_report = self._load()

    def _load(self) -> StartReport:
        """Load the frozen models into their host copies, then the student, its optimizer and its state of the run."""
        options = self._role.checkpoint(self.config)
        verification = Verification(enabled=not options.no_verify_checkpoint)
        loader = ModelLoader(self.model, self.bridge, self.snapshots, verification)
        if self.config.algorithm.use_kl_loss:
            location = directory.require(options.ref_load, "--ref-load", options.ref_ckpt_step)
            loader.keep("reference", Source(location, "--ref-load"))
        teacher_print, teacher = (
            self._load_teacher(loader) if self.config.teacher.is_in_trainer else (None, self._no_teacher)
        )
        source = student_source(options, self.config.model.hf_checkpoint)
        student_print = loader.load(source)
        self._prepare_training(teacher)
        run_state = self._resume(source, options)
        warnings = verification.warnings
        if (note := kernels(self.config).note) is not None:
            warnings.append(note)
        if teacher_print == student_print:
            warnings.append(
                f"teacher and student are identical (weights' fingerprint {student_print[0]:.6g}): the penalty is 0 until the student moves"
            )
        return StartReport(str(source), run_state, tuple(warnings))

    def _load_teacher(self, loader: ModelLoader) -> tuple[Fingerprint, TeacherLayer]:
        opd = self.config.opd
        location = directory.require(opd.opd_teacher_load, "--opd-teacher-load", opd.opd_teacher_ckpt_step)
        source = Source(location, "--opd-teacher-load")
        weights = loader.keep("teacher", source, resident=opd.opd_teacher_resident, any_vocabulary=True)
        return weights, self._teacher_layer(vocabulary_rows(location))

    def _resume(self, source: Source, options: CheckpointConfig) -> dict[str, Any]:
        """Load optimizer and schedule if the run resumes from `source`; returns the run's state, {} for a new run."""
        if source.location.iteration is None or source.flag != "--load" or options.finetune:
            return {}
        run_state = directory.read_run_state(source.location)
        if options.no_load_optim:
            self.scheduler.step(increment=int(run_state.get("step", 0)) * max(1, self.config.steps_per_rollout))
        else:
            settings = group_settings(self.optimizer)
            load_training_state(self._training_state(), source.location, source.flag)
            restore_settings(self.optimizer, self.scheduler, settings)
        return run_state

    @property
    def _no_teacher(self) -> TeacherLayer:
        return TeacherLayer(None, self.shard)

    def _teacher_layer(self, vocabulary_rows: int | None = None) -> TeacherLayer:
        """The output layer of the teacher, whose weights are in the model; `vocabulary_rows`: of its vocabulary.

        It is copied where distributions are compared: student and teacher meet at their logits, long after the
        teacher's other weights have left the device.
        """
        if self.shard is None:
            return TeacherLayer(None, None)
        shard = (
            self.shard if vocabulary_rows is None else replace(self.shard, size=min(self.shard.size, vocabulary_rows))
        )
        weight = self.model.output_weight().detach().clone() if self.config.has_divergence else None
        return TeacherLayer(weight, shard)

    def _prepare_training(self, teacher: TeacherLayer) -> None:
        """Put the student, whose weights are loaded, into gradient buffers, and make optimizer, schedule and passes."""
        self.wrapped = wrap(self.config, self.model)
        self.optimizer: MegatronOptimizer = self._role.make_optimizer(self.config, self.wrapped)
        self.scheduler = make_scheduler(self.config, self.optimizer)
        self._teacher = teacher
        self.model_pass = ModelPass(self.config, self.model, self.wrapped, self.shard)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of all passes so far; another thread reads it to see that the rank advances."""
        return self.model_pass.num_micro_batches

    def _training_state(self) -> TrainingState:
        return TrainingState(self.model, self.optimizer, self.scheduler)

    def score(self, batch: TrainBatch, progress: float, names: frozenset[str] = frozenset()) -> dict[str, np.ndarray]:
        """Begin a rollout: run the models whose scores its steps need over the rank's share, which is kept for `step`.

        `progress`: the share of the run's rollouts that came before. Returns those of the columns `names` that were
        scored, in the batch's order; {} on ranks that do not report.
        """
        scorer = Scorer(self.config, self.model_pass, self.snapshots, self._teacher)
        self._batch, self._teacher_states = scorer.score(batch, self._role.settings(self.config, progress))
        columns = self._batch.samples.columns
        return {name: columns[name] for name in sorted(names & columns.keys())} if self.layout.reports else {}

    def step(self, columns: Mapping[str, np.ndarray], progress: float) -> dict[str, Metric]:
        """Take the optimizer steps of the rollout that `score` began.

        `columns`: what `assemble` made of it, for this share.

        Returns this rank's metrics, of the last step; {} on ranks that do not report.
        """
        if self._batch is None:
            raise RuntimeError("step() without a rollout: score() begins one, and each is stepped once")
        settings = self._role.settings(self.config, progress)
        batch, self._batch = self._batch.with_columns(columns), None
        self.wrapped.train()
        self.skipped.start_rollout()
        metrics: dict[str, Metric] = {}
        for step in range(len(batch.steps)):
            # A rollout of several steps reports its last one, the same way whether it has one or many.
            metrics = self._step(batch, step, settings)
        self._teacher_states = None
        finish_gathering_weights(self.wrapped)
        metrics |= {name: Replicated(count) for name, count in self.skipped.counts().items()}
        return metrics if self.layout.reports else {}

    def _step(self, batch: TrainBatch, step: int, settings: HeadSettings) -> dict[str, Metric]:
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        model_pass = self.model_pass

        def objective(hidden: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Objective]:
            head = self._role.make_head(
                model_pass, micro_batch, settings, hidden, self._teacher_states, self._teacher.shard
            )
            total = chunked_objective(hidden, self.model.output_weight(), self.shard, head, model_pass.chunk_size)
            return total.loss, total

        objectives = model_pass.run(batch, slice(step, step + 1), objective, forward_only=False)
        losses, learning_rate = [one.loss for one in objectives], self.optimizer.param_groups[0]["lr"]
        cause, grad_norm = self._take_step(losses)
        self.skipped.note(cause, lambda: finite.describe_step(batch, step, losses))
        return {
            **_collect(objectives),
            # A skipped step has none.
            **({} if grad_norm is None else {"train/grad_norm": Replicated(grad_norm)}),
            "train/lr": Replicated(float(learning_rate)),
        }

    def _take_step(self, losses: list[Tensor]) -> tuple[finite.Cause | None, float | None]:
        """Step optimizer and schedule unless a rank has a non-finite number; returns why not, and the gradient norm."""
        # While float16's loss scale can fall, a gradient that overflows is how it is found.
        is_scaling = loss_scale_can_fall(self.optimizer)
        if self._checks_finite:
            cause = finite.non_finite(losses, [] if is_scaling else gradients(self.wrapped))
            if cause is not None:
                return cause, None
        succeeded, grad_norm, _ = self.optimizer.step()
        if not succeeded:
            return "overflow" if is_scaling else "gradient", None
        # As in Megatron-LM the schedule counts the steps that were taken.
        self.scheduler.step(increment=1)
        return None, float(grad_norm)

    def exported_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The student's weights in Hugging Face's names and shapes, one at a time, on every rank."""
        if self._gathered_weights is None:
            self._gathered_weights = GatheredWeights(self.model, self.bridge)
        return iter(self._gathered_weights)

    def save(self, iteration: int, run_state: dict[str, Any]) -> Path:
        """Write a checkpoint under --save."""
        options = self._role.checkpoint(self.config)
        training = None if options.no_save_optim else self._training_state()
        tokenizer = self.config.model.hf_checkpoint
        with self._waiting_for_files():
            return save(options.save, iteration, self.model, training, run_state, options.keep_checkpoints, tokenizer)

    def _waiting_for_files(self) -> AbstractContextManager[None]:
        return parallel.waiting_for_files(self.config.training.distributed_timeout_minutes)

    def save_hugging_face(self, iteration_directory: str, path: str) -> None:
        """Write the checkpoint in `iteration_directory` as a Hugging Face directory at `path`; for one rank alone."""
        origin = self.config.model.hf_checkpoint
        replace_directory(path, lambda partial: torch_dist_to_hf.convert(iteration_directory, partial, origin))


def _collect(objectives: list[Objective]) -> dict[str, Metric]:
    """The metrics of a step's micro-batches on this rank, with few copies from the device."""
    if not objectives:
        return {}
    total = Objective.of_chunks(objectives)
    values = torch.stack([*total.totals.values(), *(part for pair in total.means.values() for part in pair)]).tolist()
    pairs = values[len(total.totals) :]
    return {
        **{name: Total(value) for name, value in zip(total.totals, values, strict=False)},
        **{name: Mean(pairs[2 * i], pairs[2 * i + 1]) for i, name in enumerate(total.means)},
        **{name: Concentration(*map(tuple, bins.tolist())) for name, bins in total.histograms.items()},
    }
