"""One trainer rank: the verbs that the run asks of it.

A Trainer owns its rank's part of the model, the optimizer, and the host copies of reference and teacher. It is given
TrainBatches and returns metrics; it knows nothing of Ray, HTTP or rollouts.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from slime_opd.algorithm.objective import Objective, PolicyOptions, policy_objective, sft_objective
from slime_opd.config import Config
from slime_opd.errors import CheckpointError
from slime_opd.megatron import checkpoint, device, parallel
from slime_opd.megatron.batch import MicroBatch, micro_batches
from slime_opd.megatron.linear_log_probs import linear_log_probs
from slime_opd.megatron.model import HiddenStatesModel, build_model, exported_weights, make_bridge, vocabulary_shard
from slime_opd.megatron.optimizer import make_optimizer, make_scheduler, wrap
from slime_opd.megatron.snapshots import WeightSnapshots, fingerprint
from slime_opd.observe.metrics import Last, Mean, Metric, Total
from slime_opd.types import StartReport, TrainBatch


class Trainer:
    """One rank of the trainer. Every method is called on all ranks together."""

    def __init__(self, config: Config, *, rank: int, world_size: int, init_method: str) -> None:
        self.config = config
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
        self._shard = vocabulary_shard(self.model, self.bridge) if self.layout.is_last_stage else None
        self.start_report = self._load()

    def _load(self) -> StartReport:
        """Load reference and teacher into their host copies, then the student, its optimizer and its place in the run."""
        options = self.config.checkpoint
        prints: dict[str, tuple[float, float]] = {}
        if self.config.algorithm.use_kl_loss:
            location = checkpoint.require(options.ref_load, "--ref-load", options.ref_ckpt_step)
            prints["reference"] = self._keep("reference", location, "--ref-load")
        if self.config.has_megatron_teacher:
            opd = self.config.opd
            location = checkpoint.require(opd.opd_teacher_load, "--opd-teacher-load", opd.opd_teacher_ckpt_step)
            prints["teacher"] = self._keep("teacher", location, "--opd-teacher-load")
        location, flag = self._student_location()
        checkpoint.load_weights(self.model, self.bridge, location, flag)
        prints["student"] = fingerprint(self.model)
        self.wrapped = wrap(self.config, self.model)
        self.optimizer: MegatronOptimizer = make_optimizer(self.config, self.wrapped)
        self.scheduler = make_scheduler(self.config, self.optimizer)
        run_state: dict[str, Any] = {}
        if location.iteration is not None and flag == "--load" and not options.finetune:
            run_state = checkpoint.read_run_state(location)
            if not options.no_load_optim:
                checkpoint.load_training_state(self._training_state(), location)
        warnings = []
        if "teacher" in prints and prints["teacher"] == prints["student"]:
            warnings.append(
                f"teacher and student are identical (weights' fingerprint {prints['student'][0]:.6g}): the penalty is 0 until the student moves"
            )
        return StartReport(f"{flag} {location.directory}", run_state, tuple(warnings))

    def _student_location(self) -> tuple[checkpoint.Location, str]:
        options = self.config.checkpoint
        location = checkpoint.find(options.load, options.ckpt_step) if options.load else None
        if location is not None:
            return location, "--load"
        if options.ref_load:
            return checkpoint.require(options.ref_load, "--ref-load", options.ref_ckpt_step), "--ref-load"
        return checkpoint.require(self.config.model.hf_checkpoint, "--hf-checkpoint"), "--hf-checkpoint"

    def _keep(self, name: str, location: checkpoint.Location, flag: str) -> tuple[float, float]:
        """Load weights into the model and keep them on the host under `name`; returns their fingerprint."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.zero_()
        checkpoint.load_weights(self.model, self.bridge, location, flag)
        # Norms and biases may be zero; a matrix that still is was not loaded.
        untouched = [key for key, weight in self.model.named_parameters() if weight.dim() > 1 and not weight.any()]
        if untouched:
            raise CheckpointError(
                f"{flag} {location.directory}: the {name} was not really loaded: {len(untouched)} matrices are still empty, first {untouched[0]}"
            )
        self.snapshots.keep(name)
        return fingerprint(self.model)

    def _training_state(self) -> checkpoint.TrainingState:
        return checkpoint.TrainingState(self.model, self.optimizer, self.scheduler)

    def train(self, batch: TrainBatch) -> dict[str, Metric]:
        """Score the batch with the models that the objective needs, then take its optimizer steps.

        Returns the metrics of this rank; {} on ranks that do not report.
        """
        batch = self._score_all(batch)
        self.wrapped.train()
        metrics: dict[str, Metric] = {}
        for step in range(len(batch.steps)):
            # A rollout of several steps reports its last one, the same way whether it has one or many.
            metrics = self._step(batch, step)
        return metrics if self.layout.reports else {}

    def _step(self, batch: TrainBatch, step: int) -> dict[str, Metric]:
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        objectives = self._run(batch, slice(step, step + 1), self._objective, forward_only=False)
        succeeded, grad_norm, _ = self.optimizer.step()
        learning_rate = self.optimizer.param_groups[0]["lr"]
        self.scheduler.step(increment=1)
        skipped = 0.0 if succeeded else 1.0
        return {
            **_collect(objectives),
            "train/grad_norm": Last(float(grad_norm)),
            "train/lr": Last(float(learning_rate)),
            "train/skipped_steps": Last(skipped),
        }

    def _objective(self, hidden: Tensor, batch: MicroBatch) -> tuple[Tensor, Objective]:
        config = self.config
        log_probs, entropies = self._log_probs(hidden, batch, config.rollout.rollout_temperature)
        if config.is_sft:
            objective = sft_objective(batch.columns, log_probs, entropies)
        else:
            penalty = None
            if self._teacher_temperature is not None and "penalty_log_probs" not in batch.columns:
                with torch.no_grad():
                    penalty, _ = self._log_probs(hidden, batch, self._teacher_temperature)
            objective = policy_objective(batch.columns, log_probs, entropies, penalty, self._policy_options)
        return objective.loss, objective

    @property
    def _policy_options(self) -> PolicyOptions:
        algorithm, opd = self.config.algorithm, self.config.opd
        return PolicyOptions(
            clip_low=algorithm.eps_clip,
            clip_high=algorithm.eps_clip if algorithm.eps_clip_high is None else algorithm.eps_clip_high,
            dual_clip=algorithm.eps_clip_c,
            entropy_coefficient=algorithm.entropy_coef,
            kl_coefficient=algorithm.kl_loss_coef if algorithm.use_kl_loss else None,
            kl_kind=algorithm.kl_loss_type,
            opd_coefficient=opd.opd_kl_coef if opd.use_opd else None,
            use_rollout_log_probs=algorithm.use_rollout_logprobs,
        )

    @property
    def _teacher_temperature(self) -> float | None:
        """The teacher's temperature where it differs from the rollout's: a server scores at 1, whatever it is asked."""
        differs = self.config.has_sglang_teacher and self.config.rollout.rollout_temperature != 1.0
        return 1.0 if differs else None

    def _score_all(self, batch: TrainBatch) -> TrainBatch:
        """Add the log-probs that the objective needs beside the policy's own: reference, teacher, and old policy."""
        temperature = self.config.rollout.rollout_temperature
        names = {"reference": "ref_log_probs", "teacher": "teacher_log_probs"}
        kept = [name for name in names if name in self.snapshots]
        if kept:
            with self.snapshots.swapped_in(*kept) as in_turn:
                for name in in_turn:
                    batch = self._score(batch, names[name], temperature)
        # With one step per rollout the old policy is the policy itself, and the step's own forward gives its log-probs.
        if len(batch.steps) > 1 and not self.config.is_sft:
            batch = self._score(batch, "log_probs", temperature)
            if self._teacher_temperature is not None:
                batch = self._score(batch, "penalty_log_probs", self._teacher_temperature)
        return batch

    def _score(self, batch: TrainBatch, column: str, temperature: float) -> TrainBatch:
        """The batch with the log-probs of the model's present weights as `column`; unchanged before the last stage."""
        self.wrapped.eval()

        def log_probs(hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
            return self._log_probs(hidden, micro_batch, temperature)[0]

        with torch.no_grad():
            scores = self._run(batch, slice(None), log_probs, forward_only=True)
        if not self.layout.is_last_stage:
            return batch
        return TrainBatch(batch.samples.with_column(column, torch.cat(scores).float().cpu().numpy()), batch.steps)

    def score(self, batch: TrainBatch, temperature: float = 1.0) -> Tensor | None:
        """The student's log-probs of all response tokens of the batch, float32 [R]; None before the last stage."""
        scored = self._score(batch, "log_probs", temperature)
        if not self.layout.is_last_stage:
            return None
        return torch.from_numpy(scored.samples.columns["log_probs"])

    def _log_probs(self, hidden: Tensor, batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
        return linear_log_probs(
            hidden[batch.predicting],
            self.model.output_weight(),
            batch.targets,
            self._shard,
            temperature=temperature,
            chunk_size=self.config.training.log_probs_chunk_size,
        )

    def _run(self, batch: TrainBatch, steps: slice, head: Any, *, forward_only: bool) -> list:
        """Run Megatron's schedule over micro-batches; `head(hidden [T, H], micro_batch)` runs on the last stage.

        Training: head returns (loss, result). Forward only: head returns the result. Gives the results in order.
        """

        def forward_step(batches: Iterator[MicroBatch], model: torch.nn.Module):
            micro_batch = next(batches)
            hidden = model(micro_batch.tokens, micro_batch.position_ids, None, packed_seq_params=micro_batch.packed)
            return hidden, partial(finish, micro_batch)

        def finish(micro_batch: MicroBatch, hidden: Tensor, non_loss_data: bool = False):
            hidden = self._gathered(hidden)
            if non_loss_data:
                return head(hidden, micro_batch)
            loss, result = head(hidden, micro_batch)
            # The weights of the objective hold every denominator; Megatron is to divide by nothing.
            return loss, torch.ones((), dtype=torch.int, device=loss.device), result

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=micro_batches(batch, device.device(), steps),
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
        return exported_weights(self.model, self.bridge)

    def save(self, iteration: int, run_state: dict[str, Any]) -> Path:
        """Write a checkpoint under --save."""
        options = self.config.checkpoint
        training = None if options.no_save_optim else self._training_state()
        return checkpoint.save(options.save, iteration, self.model, training, run_state, options.keep_checkpoints)


def _collect(objectives: list[Objective]) -> dict[str, Metric]:
    """The metrics of a step's micro-batches on this rank, with one copy from the device."""
    if not objectives:
        return {}
    totals, means = list(objectives[0].totals), list(objectives[0].means)
    rows = [
        torch.stack([*o.totals.values(), *(part for pair in o.means.values() for part in pair)]) for o in objectives
    ]
    values = torch.stack(rows).sum(dim=0).tolist()
    pairs = values[len(totals) :]
    return {name: Total(value) for name, value in zip(totals, values, strict=False)} | {
        name: Mean(pairs[2 * i], pairs[2 * i + 1]) for i, name in enumerate(means)
    }
