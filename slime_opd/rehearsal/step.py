"""One training step of one rank on the simulated device: build, wrap, score, forward, backward, optimizer.

The trainer is the product's; only reading files is skipped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from slime_opd.batch.train import train_rollout
from slime_opd.checkpoint.formats.state import state_to_save
from slime_opd.config import Config
from slime_opd.metrics import Metric
from slime_opd.model import parallel
from slime_opd.rehearsal import groups, simulated_cuda
from slime_opd.rehearsal.batch import Load, make_samples
from slime_opd.rehearsal.memory import LiveMemory
from slime_opd.rehearsal.syncs import FakeDevice, FakeTensors, HostSyncs
from slime_opd.rehearsal.where import Line
from slime_opd.trainer.trainer import Trainer
from slime_opd.types import StartReport, TrainBatch

SIMULATED = (
    *simulated_cuda.SIMULATED,
    *groups.SIMULATED,
    "tensors: FakeTensorMode's, with shapes but no values; values that the host reads are made up",
    "checkpoints: nothing is loaded; the model keeps its initial weights",
    "the rollout: equal samples that fill every micro-batch",
)

NOT_COVERED = (
    "Transformer Engine's layers",
    "scratch memory of kernels (flash attention, matrix products)",
    "memory of NCCL and of the CUDA context",
    "fragmentation of CUDA's allocator",
    "loading, the export of weights, SGLang",
    "speed",
)

# In the order of a run.
PHASES = ("build", "teacher", "wrap", "score", "forward", "head", "backward", "optimizer", "save")


@dataclass(frozen=True)
class Rehearsed:
    """Measurements of a rehearsed step.

    memory: live bytes and kernels by phase. syncs: number of waits of the host in one step, by kind and line;
    setup_syncs: before it.
    """

    memory: LiveMemory
    syncs: dict[tuple[str, Line], int]
    setup_syncs: dict[tuple[str, Line], int]
    parameters: int
    steps: int

    def kernels(self, phase: str) -> int:
        """Number of kernels in one phase of one step."""
        return self.memory.phases[phase].kernels // self.steps

    @property
    def peak(self) -> int:
        """Peak of live bytes on the device, without the save."""
        return max(phase.peak for name, phase in self.memory.phases.items() if name != "save")


class _RehearsedTrainer(Trainer):
    """A trainer that keeps its initial weights, and marks the phases of its step."""

    def __init__(self, config: Config, memory: LiveMemory, *, rank: int, world_size: int) -> None:
        self._memory = memory
        super().__init__(config, rank=rank, world_size=world_size, init_method="")

    def _load(self) -> StartReport:
        with self._memory.phase("teacher"):
            if self.config.algorithm.use_kl_loss:
                self.snapshots.keep("reference")
            teacher = self._no_teacher
            if self.config.teacher.is_in_trainer:
                self.snapshots.keep("teacher", resident=self.config.opd.opd_teacher_resident)
                teacher = self._teacher_layer()
        with self._memory.phase("wrap"):
            self._prepare_training(teacher)
            self.model_pass.run = partial(self._measured_run, self.model_pass.run)
        return StartReport("nothing", {}, ())

    def _measured_run(self, run: Any, batch: Any, steps: slice, head: Any, *, forward_only: bool) -> list:
        def measured(*args: Any) -> Any:
            with self._memory.phase("score" if forward_only else "head"):
                result = head(*args)
            # After the loss of a micro-batch, the schedule runs its backward.
            self._memory.switch("score" if forward_only else "backward")
            return result

        forward = "score" if forward_only else "forward"
        hook = self.wrapped.register_forward_pre_hook(lambda *_: self._memory.switch(forward))
        try:
            with self._memory.phase(forward):
                return run(batch, steps, measured, forward_only=forward_only)
        finally:
            hook.remove()

    def _take_step(self, losses: list) -> tuple:
        with self._memory.phase("optimizer"):
            return super()._take_step(losses)


class _OneRank:
    """The trainer group of a rehearsal: the first data-parallel rank, whose scores stand for those of every other."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def score(
        self, batches: Sequence[TrainBatch], progress: float, names: frozenset[str]
    ) -> list[dict[str, np.ndarray]]:
        columns = self._trainer.score(batches[0], progress, names)
        # A rank that does not report returns none: its step reads zeros.
        missing = names - columns.keys() if not self._trainer.layout.reports else set()
        zeros = np.zeros(int(batches[0].samples.response_lengths.sum()), np.float32)
        return [columns | dict.fromkeys(missing, zeros)] * len(batches)

    def step(self, columns: Sequence[Mapping[str, np.ndarray]], progress: float) -> dict[str, Metric]:
        return self._trainer.step(columns[0], progress)


def rehearse(
    config: Config,
    load: Load,
    *,
    rank: int = 0,
    steps: int = 2,
    with_save: bool = False,
) -> Rehearsed:
    """Take `steps` optimizer steps as `rank`.

    Adam's state is created in the first, so the second is the first that is typical.

    Needs `simulated_cuda.load()` and `install()` before.
    """
    samples = make_samples(config, load)
    memory, syncs = LiveMemory(), HostSyncs()
    fake = FakeTensors(allow_non_fake_inputs=True)
    with groups.simulated(), FakeDevice(syncs), fake, syncs, memory:
        with memory.phase("build"), torch.device("cuda", 0):
            trainer = _RehearsedTrainer(config, memory, rank=rank, world_size=config.world_size)
        setup = dict(syncs.counts)
        syncs.counts.clear()
        for _ in range(steps):
            train_rollout(_OneRank(trainer), samples, config, 0.0)
        waits = {key: count // steps for key, count in syncs.counts.items()}
        if with_save:
            with memory.phase("save"):
                # What a save gathers before anything is written.
                state_to_save(trainer.model, trainer._training_state(), 1)
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    parallel.shut_down()
    return Rehearsed(memory, waits, setup, parameters, steps)
