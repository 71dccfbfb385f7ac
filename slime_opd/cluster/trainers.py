"""The trainer's ranks as Ray actors, and the group that speaks to them as one."""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray

from slime_opd import lifetimes, metrics
from slime_opd.cluster import heartbeat
from slime_opd.cluster.bundles import in_rank_order
from slime_opd.cluster.session import Slot
from slime_opd.cluster.watchdog import Watchdog
from slime_opd.config import Config
from slime_opd.config.weight_transport import weight_transport
from slime_opd.engine.health import process_status
from slime_opd.engine.ports import free_port
from slime_opd.observe.watch import ProcessView, Status
from slime_opd.types import StartReport, TrainBatch

# Seconds for all ranks to start: imports, a checkpoint from a slow disk, and the first collective.
START_TIMEOUT_S = 1800

_ENVIRONMENT = {"PYTHONWARNINGS": "ignore"}


@ray.remote
class TrainerActor:
    """One trainer rank in a process of its own.

    It learns its rank from `set_rank`, once it is known where it stands.
    """

    def __init__(self, config: Config, world_size: int, role: str) -> None:
        lifetimes.own(os.environ[lifetimes.RUN_VARIABLE])
        # These say at INFO what only their authors want to know; the run prints what matters.
        for chatty in ("megatron", "httpx"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
        # It warns that its own default is used.
        logging.getLogger("megatron.core.rerun_state_machine").setLevel(logging.ERROR)
        self._config, self._world_size, self._role = config, world_size, role
        self._sender: Any = None
        self._trainer: Any = None

    def set_rank(self, rank: int) -> None:
        """Become this rank."""
        self._rank = rank
        logging.basicConfig(level=logging.INFO, format=f"[trainer {rank}] %(message)s")

    def report_under(self, key: str) -> None:
        """Report from now on, under `key`, that this rank lives, and its micro-batches."""
        heartbeat.Heartbeat(key, lambda: 0 if self._trainer is None else self._trainer.num_micro_batches)

    def address(self) -> str:
        """A rendezvous address on this actor's node."""
        return f"tcp://{ray.util.get_node_ip_address()}:{free_port('')}"

    def gpu_ids(self) -> list[str]:
        """The GPUs that Ray gave this rank."""
        return [str(gpu) for gpu in ray.get_gpu_ids()]

    def start(self, init_method: str) -> StartReport:
        """Build and load the rank's model; returns its StartReport."""
        import torch

        if self._config.needs_engines:
            # Refuses what cannot work before anything is loaded.
            weight_transport(self._config, has_gpus=torch.cuda.is_available())
        if not torch.cuda.is_available():
            # Ranks on one node share its cores.
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // self._config.cluster.actor_num_gpus_per_node))
        from slime_opd.trainer.roles import ROLES
        from slime_opd.trainer.trainer import Trainer

        self._trainer = Trainer(
            self._config,
            rank=self._rank,
            world_size=self._world_size,
            init_method=init_method,
            role=ROLES[self._role],
        )
        return self._trainer.start_report

    def data_rank(self) -> int:
        """Which TrainBatch is this rank's."""
        return self._trainer.layout.data_rank

    def score(self, batch: TrainBatch, progress: float, names: frozenset[str]) -> dict[str, np.ndarray]:
        """Score this rank's share of a rollout, and keep it for `step`."""
        return self._trainer.score(batch, progress, names)

    def step(self, columns: dict[str, np.ndarray], progress: float) -> dict[str, metrics.Metric]:
        """Take the optimizer steps of the share that was scored."""
        return self._trainer.step(columns, progress)

    def save(self, iteration: int, run_state: dict[str, Any]) -> str:
        """Write a checkpoint."""
        return str(self._trainer.save(iteration, run_state))

    def save_hugging_face(self, iteration_directory: str, path: str) -> None:
        """Write a checkpoint as a Hugging Face directory."""
        self._trainer.save_hugging_face(iteration_directory, path)

    def update_weights(self, urls: list[str], key: str | None, version: int, check: bool) -> None:
        """Send the weights to the engines at `urls`; all ranks gather them."""
        from slime_opd.weights.update import WeightSender

        if self._sender is None:
            self._sender = WeightSender(self._config, self._rank, urls, key)
        self._sender.send(self._trainer.exported_weights, version, check=check)


class TrainerGroup:
    """All trainer ranks; every verb runs on all of them and waits."""

    def __init__(
        self,
        config: Config,
        slots: list[Slot],
        watchdog: Watchdog,
        environment: Mapping[str, str] | None = None,
        role: str = "actor",
    ) -> None:
        """`environment`: variables of each rank, beside those of every run. `role`: see slime_opd/trainer/roles.py."""
        self._watchdog = watchdog
        self._names = [f"trainer rank {rank}" for rank in range(len(slots))]
        variables = {**_ENVIRONMENT, **(environment or {})}
        self._actors = [
            TrainerActor.options(**slot.options_in(f"trainer-{index}", variables)).remote(config, len(slots), role)
            for index, slot in enumerate(slots)
        ]
        self._bundles = [slot.bundle for slot in slots]
        self._reports = RankReports(self._names)
        # Calls of `score` whose end `step` waits for.
        self._pending_scores: list[Any] = []
        watchdog.add(self._look)

    def gpu_ids(self) -> list[list[str]]:
        """The GPUs of each rank."""
        return self._all("gpu_ids")

    def begin_start(self) -> list[Any]:
        """Give each process its rank and start it, without waiting; `finish_start` takes what this returns."""
        if None not in self._bundles:
            places = [(bundle, gpus[0]) for bundle, gpus in zip(self._bundles, self.gpu_ids(), strict=True)]
            self._actors = [self._actors[index] for index in in_rank_order(places)]
        for rank, (actor, key) in enumerate(zip(self._actors, self._reports.keys, strict=True)):
            actor.set_rank.remote(rank)
            actor.report_under.remote(key)
        (address,) = self._watchdog.get([self._actors[0].address.remote()], self._names[:1])
        return [actor.start.remote(address) for actor in self._actors]

    def finish_start(self, pending: list[Any]) -> StartReport:
        """Wait for every rank; returns the first rank's StartReport."""
        with self._watchdog.waiting_for("loading the models into the trainer"):
            report = self._watchdog.get(pending, self._names, START_TIMEOUT_S)[0]
        self._data_ranks = self._all("data_rank")
        return report

    def score(
        self, batches: Sequence[TrainBatch], progress: float, names: frozenset[str]
    ) -> list[dict[str, np.ndarray]]:
        """Begin a rollout, one TrainBatch per data-parallel rank, when `progress` (0 to 1) of the run is done.

        The ranks run the models whose scores the rollout's steps need, and keep the batches and scores. Returns, per
        data-parallel rank, the scored columns among `names`; without names it does not wait.
        """
        calls = self._call_shares("score", batches, progress, names)
        columns: list[dict[str, np.ndarray]] = [{} for _ in batches]
        if not names:
            self._pending_scores = calls
            return columns
        for share, scored in zip(self._data_ranks, self._watchdog.get(calls, self._names), strict=True):
            columns[share] |= scored
        return columns

    def step(self, columns: Sequence[Mapping[str, np.ndarray]], progress: float) -> dict[str, metrics.Metric]:
        """Take the optimizer steps of the rollout that was scored.

        `columns`: what `assemble` made, per data-parallel rank.
        """
        calls, pending = self._call_shares("step", columns, progress), self._pending_scores
        self._pending_scores = []
        if pending:
            # Before the steps: where scoring failed, its error is the cause, and that of the step a consequence.
            self._watchdog.get(pending, self._names)
        ranks = self._watchdog.get(calls, self._names)
        return metrics.merge([rank for rank in ranks if rank])

    def _call_shares(self, method: str, shares: Sequence[Any], *arguments: Any) -> list[Any]:
        """Call a method of every rank with its data-parallel rank's share, which is put into shared memory once."""
        shared = [ray.put(share) for share in shares]
        return [
            getattr(actor, method).remote(shared[rank], *arguments)
            for actor, rank in zip(self._actors, self._data_ranks, strict=True)
        ]

    def update_weights(self, urls: list[str], version: int, *, key: str | None, check: bool) -> None:
        """Bring the engines at `urls`, whose API key is `key`, to the trainer's weights."""
        self._all("update_weights", urls, key, version, check)

    def save(self, iteration: int, run_state: dict[str, Any]) -> str:
        """Write a checkpoint; returns its directory."""
        return self._all("save", iteration, run_state)[0]

    def save_hugging_face(self, iteration_directory: str, path: str) -> None:
        """Write the checkpoint in `iteration_directory` as a Hugging Face directory at `path`, on the first rank."""
        call = self._actors[0].save_hugging_face.remote(iteration_directory, path)
        self._watchdog.get([call], self._names[:1])

    def stop(self) -> None:
        """End every rank's process."""
        self._reports.close()
        for actor in self._actors:
            ray.kill(actor)

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        return self._watchdog.get([getattr(actor, method).remote(*arguments) for actor in self._actors], self._names)

    def _look(self) -> list[ProcessView]:
        """The ranks as their reports show them, for the watchdog, which hears of their progress."""
        views, advanced = self._reports.look()
        if advanced:
            self._watchdog.advance(advanced, "micro-batches")
        return views


class RankReports:
    """What is known of the ranks from their heartbeats, and of those on this machine from the kernel."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        run = uuid.uuid4().hex
        self.keys = [f"{run}/{rank}" for rank in range(len(names))]
        self._node = ray.util.get_node_ip_address()
        self._latest: dict[str, tuple[heartbeat.Beat, float]] = {}
        self._is_closed = False

    def look(self) -> tuple[list[ProcessView], int]:
        """Each rank that has reported, and the micro-batches that are done since the last look."""
        views, advanced = [], 0
        for name, key in zip(self._names, self.keys, strict=True):
            beat = heartbeat.latest(key)
            if beat is None:
                continue
            before, seen_at = self._latest.get(key, (None, 0.0))
            if beat != before:
                self._latest[key] = beat, (seen_at := time.monotonic())
                # Ranks that share a sample count it each: the largest count is the rollout's.
                advanced = max(advanced, beat.done - (before.done if before else 0))
            views.append(ProcessView(name, self._status(beat, time.monotonic() - seen_at), f"process {beat.pid}"))
        # A rank that was ended while this looked is not to be taken for dead.
        return ([], 0) if self._is_closed else (views, advanced)

    def close(self) -> None:
        """Nothing is reported any more: the ranks are about to be ended."""
        self._is_closed = True

    def _status(self, beat: heartbeat.Beat, age_s: float) -> Status:
        if beat.node == self._node:
            return {"dead": Status.DEAD, "stopped": Status.STOPPED}.get(process_status(beat.pid), Status.ALIVE)
        return Status.SILENT if age_s > heartbeat.SILENT_AFTER_S else Status.ALIVE
