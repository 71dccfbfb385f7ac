"""One trainer rank: the verbs that the run asks of it.

A Trainer owns its rank's part of the model, the optimizer, and the host copies of reference and teacher. It is given
TrainBatches and returns metrics; it knows nothing of Ray, HTTP or rollouts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from slime_opd.checkpoint import directory
from slime_opd.checkpoint.formats import export
from slime_opd.checkpoint.formats import model_state as checkpoint
from slime_opd.checkpoint.formats.verification import Verification
from slime_opd.config import Config
from slime_opd.distill.penalty import clamp_signal, discounted_sums, sampled_reverse_kl
from slime_opd.errors import CheckpointError
from slime_opd.head.objective_head import HeadSettings, ObjectiveHead, TeacherStates
from slime_opd.head.output_layer import chunked_objective, score
from slime_opd.head.vocabulary import VocabularyShard
from slime_opd.model import device, parallel
from slime_opd.model.builder import (
    HiddenStatesModel,
    build_model,
    is_padding,
    kernels,
    make_bridge,
    vocabulary_shard,
)
from slime_opd.objective.objective import Objective
from slime_opd.observe.metrics import Concentration, Last, Mean, Metric, Total
from slime_opd.trainer import finite
from slime_opd.trainer.micro_batch import MicroBatch, micro_batches
from slime_opd.trainer.optimizer import (
    finish_gathering_weights,
    gradients,
    group_settings,
    loss_scale_can_fall,
    make_optimizer,
    make_scheduler,
    restore_settings,
    wrap,
)
from slime_opd.trainer.scoring import ScoredBatch, head_settings, score_batch
from slime_opd.trainer.snapshots import WeightSnapshots, fingerprint
from slime_opd.types import StartReport, TrainBatch
from slime_opd.weights.gathered_weights import GatheredWeights


class Trainer:
    """One rank of the trainer. Every method is called on all ranks together."""

    def __init__(self, config: Config, *, rank: int, world_size: int, init_method: str) -> None:
        self.config = config
        # Counted up by every pass, forward-only ones too; another thread reads it to see that the rank advances.
        self.micro_batches_done = 0
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
        self.shard = vocabulary_shard(self.model, self.bridge) if self.layout.is_last_stage else None
        self.teacher_weight: Tensor | None = None
        # The ids that both models have: on them they are compared.
        self.teacher_shard = self.shard
        # None where the user turned Megatron's check off.
        self._checks_finite = config.megatron.check_for_nan_in_grad is not False
        self._gathered_weights: GatheredWeights | None = None
        self.skipped = finite.SkippedSteps(config.training.max_skipped_steps if self._checks_finite else None)
        with self._waiting_for_files():
            self.start_report = self._load()

    def _load(self) -> StartReport:
        """Load reference and teacher into their host copies, then the student, its optimizer and its place in the run."""
        options = self.config.checkpoint
        self._verification = Verification(enabled=not options.no_verify_checkpoint)
        prints: dict[str, tuple[float, float]] = {}
        if self.config.algorithm.use_kl_loss:
            location = directory.require(options.ref_load, "--ref-load", options.ref_ckpt_step)
            prints["reference"] = self._keep("reference", location, "--ref-load")
        if self.config.has_megatron_teacher:
            opd = self.config.opd
            location = directory.require(opd.opd_teacher_load, "--opd-teacher-load", opd.opd_teacher_ckpt_step)
            prints["teacher"] = self._keep("teacher", location, "--opd-teacher-load", resident=opd.opd_teacher_resident)
            if self.shard is not None:
                self.teacher_shard = replace(
                    self.shard, size=min(self.shard.size, checkpoint.vocabulary_rows(location))
                )
            self._keep_teacher_output_layer()
        location, flag = self._student_location()
        self._verification.require(location, flag)
        checkpoint.load_weights(self.model, self.bridge, location, flag)
        prints["student"] = fingerprint(self.model)
        self._prepare_training()
        run_state: dict[str, Any] = {}
        if location.iteration is not None and flag == "--load" and not options.finetune:
            run_state = directory.read_run_state(location)
            if options.no_load_optim:
                self.scheduler.step(increment=int(run_state.get("step", 0)) * max(1, self.config.steps_per_rollout))
            else:
                settings = group_settings(self.optimizer)
                checkpoint.load_training_state(self._training_state(), location, flag)
                restore_settings(self.optimizer, self.scheduler, settings)
        warnings = self._verification.warnings
        if (note := kernels(self.config).note) is not None:
            warnings.append(note)
        if "teacher" in prints and prints["teacher"] == prints["student"]:
            warnings.append(
                f"teacher and student are identical (weights' fingerprint {prints['student'][0]:.6g}): the penalty is 0 until the student moves"
            )
        return StartReport(f"{flag} {location.directory}", run_state, tuple(warnings))

    def _keep_teacher_output_layer(self) -> None:
        """Copy the output layer while the model has the teacher's weights, where distributions are compared.

        Student and teacher meet at their logits, long after the teacher's other weights have left.
        """
        if self.config.has_divergence and self.layout.is_last_stage:
            self.teacher_weight = self.model.output_weight().detach().clone()

    def _prepare_training(self) -> None:
        """Put the student, whose weights are loaded, into gradient buffers, and make optimizer and schedule."""
        self.wrapped = wrap(self.config, self.model)
        self.optimizer: MegatronOptimizer = make_optimizer(self.config, self.wrapped)
        self.scheduler = make_scheduler(self.config, self.optimizer)

    def _student_location(self) -> tuple[directory.Location, str]:
        options = self.config.checkpoint
        location = directory.find(options.load, options.ckpt_step) if options.load else None
        if location is not None:
            return location, "--load"
        if options.ref_load:
            return directory.require(options.ref_load, "--ref-load", options.ref_ckpt_step), "--ref-load"
        return directory.require(self.config.model.hf_checkpoint, "--hf-checkpoint"), "--hf-checkpoint"

    def _keep(
        self, name: str, location: directory.Location, flag: str, *, resident: bool = False
    ) -> tuple[float, float]:
        """Load weights into the model and keep a copy of them under `name`; returns their fingerprint."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.zero_()
        self._verification.require(location, flag)
        checkpoint.load_weights(self.model, self.bridge, location, flag, any_vocabulary=name == "teacher")
        # Norms and biases may be zero, and a rank's share of a small vocabulary; another matrix that still is was not loaded.
        untouched = [
            key
            for key, weight in self.model.named_parameters()
            if weight.dim() > 1 and not weight.any() and not is_padding(key, weight, self.bridge)
        ]
        if untouched:
            raise CheckpointError(
                f"{flag} {location.directory}: the {name} was not really loaded: {len(untouched)} matrices are still empty, first {untouched[0]}"
            )
        self.snapshots.keep(name, resident=resident)
        return fingerprint(self.model)

    def _training_state(self) -> checkpoint.TrainingState:
        return checkpoint.TrainingState(self.model, self.optimizer, self.scheduler)

    def train(self, batch: TrainBatch, progress: float = 0.0) -> dict[str, Metric]:
        """Score the batch with the models that the objective needs, then take its optimizer steps.

        `progress`: the share of the run's rollouts that came before. Returns this rank's metrics; {} on ranks that do not
        report.
        """
        settings = head_settings(self.config, progress)
        scored = score_batch(self, batch, settings)
        self.wrapped.train()
        self.skipped.start_rollout()
        metrics: dict[str, Metric] = {}
        for step in range(len(scored.batch.steps)):
            # A rollout of several steps reports its last one, the same way whether it has one or many.
            metrics = self._step(scored, step, settings)
        finish_gathering_weights(self.wrapped)
        metrics |= {name: Last(count) for name, count in self.skipped.counts().items()}
        return metrics if self.layout.reports else {}

    def _step(self, scored: ScoredBatch, step: int, settings: HeadSettings) -> dict[str, Metric]:
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()

        def objective(hidden: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Objective]:
            head = self.head(micro_batch, settings, scored.teacher, hidden)
            total = chunked_objective(hidden, self.model.output_weight(), self.shard, head, self.chunk_size)
            return total.loss, total

        objectives = self.run(scored.batch, slice(step, step + 1), objective, forward_only=False)
        losses, learning_rate = [one.loss for one in objectives], self.optimizer.param_groups[0]["lr"]
        cause, grad_norm = self._take_step(losses)
        self.skipped.note(cause, lambda: finite.describe_step(scored.batch, step, losses))
        return {
            **_collect(objectives),
            **scored.weight_metrics(step),
            # A skipped step has none.
            **({} if grad_norm is None else {"train/grad_norm": Last(grad_norm)}),
            "train/lr": Last(float(learning_rate)),
        }

    def _take_step(self, losses: list[Tensor]) -> tuple[finite.Cause | None, float | None]:
        """Step optimizer and schedule, unless a number of any rank is not finite; returns why not, and the gradient's norm."""
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

    def head(
        self, batch: MicroBatch, settings: HeadSettings, teacher: TeacherStates | None, hidden: Tensor
    ) -> ObjectiveHead:
        """The objective of a micro-batch whose predicting hidden states are `hidden` [R, H]."""
        columns, opd = batch.columns, self.config.opd
        if settings.policy is not None and settings.policy.penalty is not None and opd.opd_kl_discount:
            # A discounted sum needs whole responses, which chunks cut.
            student = columns.get("penalty_log_probs", columns.get("log_probs"))
            if student is None or opd.opd_refresh_student:
                student = self.scores(hidden.detach(), batch, settings.teacher_temperature, self.teacher_shard)[0]
            signal = sampled_reverse_kl(student, columns["teacher_log_probs"])
            signal = clamp_signal(signal, opd.opd_kl_clamp)[0] * (columns["policy_weights"] > 0)
            columns = {**columns, "penalty": discounted_sums(signal, batch.response_lengths, opd.opd_kl_discount)}
        if teacher is not None:
            teacher = replace(teacher, hidden=teacher.hidden[batch.rows])
        return ObjectiveHead(settings, self.shard, batch.targets, columns, teacher, self.teacher_shard)

    def scores(
        self, hidden: Tensor, batch: MicroBatch, temperature: float, shard: VocabularyShard | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of a micro-batch's response tokens under the model's present weights, both [R].

        A token that is not in the vocabulary of `shard` (by default the student's) has NaN.
        """
        return score(
            hidden,
            self.model.output_weight(),
            batch.targets,
            self.shard if shard is None else shard,
            temperature=temperature,
            chunk_size=self.chunk_size,
        )

    @property
    def chunk_size(self) -> int:
        """Tokens whose logits exist at one time."""
        return self.config.log_probs_chunk_size

    def score_pass(self, batch: TrainBatch, head: Any) -> dict[str, Tensor]:
        """Run the model's present weights over the batch; `head(hidden [R, H], micro_batch)` gives tensors by name.

        Returns them joined, in the batch's order, on the head's device; {} before the last stage.
        """
        self.wrapped.eval()
        with torch.no_grad():
            parts = self.run(batch, slice(None), head, forward_only=True)
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}

    def run(self, batch: TrainBatch, steps: slice, head: Any, *, forward_only: bool) -> list:
        """Run Megatron's schedule over micro-batches; `head(hidden [R, H], micro_batch)` runs on the last stage.

        Training: head returns (loss, result). Forward only: head returns the result. Gives the results in order.
        """

        def forward_step(batches: Iterator[MicroBatch], model: torch.nn.Module):
            micro_batch = next(batches)
            self.micro_batches_done += 1
            hidden = model(micro_batch.tokens, micro_batch.position_ids, None, packed_seq_params=micro_batch.packed)
            return hidden, partial(finish, micro_batch)

        def finish(micro_batch: MicroBatch, hidden: Tensor, non_loss_data: bool = False):
            hidden = self._gathered(hidden)[micro_batch.predicting]
            if non_loss_data:
                return head(hidden, micro_batch)
            loss, result = head(hidden, micro_batch)
            # The weights of the objective hold every denominator; Megatron is to divide by nothing.
            return loss, torch.ones((), dtype=torch.int, device=loss.device), result

        layout = self.config.parallel
        multiple = layout.tensor_model_parallel_size if layout.sequence_parallel else 1
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=micro_batches(batch, device.device(), steps, multiple=multiple),
            model=[self.wrapped],
            num_microbatches=sum(len(sizes) for sizes in batch.steps[steps]),
            # Megatron asks for a sequence length and ignores it: shapes vary and are sent ahead of the tensors.
            seq_length=1,
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _gathered(self, hidden: Tensor) -> Tensor:
        """Hidden states [T, H] on every tensor-parallel rank."""
        if self.model.config.sequence_parallel:
            from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

            # The output layer's backward sums over the ranks already.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden.squeeze(1)

    def exported_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The student's weights in Hugging Face's names and shapes, one at a time, on every rank."""
        if self._gathered_weights is None:
            self._gathered_weights = GatheredWeights(self.model, self.bridge)
        return iter(self._gathered_weights)

    def save(self, iteration: int, run_state: dict[str, Any]) -> Path:
        """Write a checkpoint under --save."""
        options = self.config.checkpoint
        training = None if options.no_save_optim else self._training_state()
        tokenizer = self.config.model.hf_checkpoint
        with self._waiting_for_files():
            return checkpoint.save(
                options.save, iteration, self.model, training, run_state, options.keep_checkpoints, tokenizer
            )

    def _waiting_for_files(self) -> AbstractContextManager[None]:
        return parallel.waiting_for_files(self.config.training.distributed_timeout_minutes)

    def save_hugging_face(self, iteration_directory: str, path: str) -> None:
        """Write the checkpoint in `iteration_directory` as a Hugging Face directory at `path`; for one rank alone."""
        origin = self.config.model.hf_checkpoint
        export.replace_directory(path, lambda partial: export.write(iteration_directory, partial, origin))


def _collect(objectives: list[Objective]) -> dict[str, Metric]:
    """The metrics of a step's micro-batches on this rank, with few copies from the device."""
    if not objectives:
        return {}
    total = Objective.sum(objectives)
    values = torch.stack([*total.totals.values(), *(part for pair in total.means.values() for part in pair)]).tolist()
    pairs = values[len(total.totals) :]
    return {
        **{name: Total(value) for name, value in zip(total.totals, values, strict=False)},
        **{name: Mean(pairs[2 * i], pairs[2 * i + 1]) for i, name in enumerate(total.means)},
        **{name: Concentration(*map(tuple, bins.tolist())) for name, bins in total.histograms.items()},
    }
