"""A run: everything that train.py's loop speaks to, started together and stopped together."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np

from slime_opd import lifetimes
from slime_opd.batch.train import train_rollout
from slime_opd.checkpoint import directory
from slime_opd.checkpoint.lock import RunLock
from slime_opd.checkpoint.saves import BY_REQUEST
from slime_opd.cluster import ray_processes, session
from slime_opd.cluster.checkpoints import RunCheckpoints
from slime_opd.cluster.engines import EngineGroup
from slime_opd.cluster.environment import allocator_problem, engine_environment, trainer_environment
from slime_opd.cluster.run_config import run_dir, with_disk_directory, with_epochs, without_checkpoints
from slime_opd.cluster.trainers import TrainerGroup
from slime_opd.cluster.watchdog import Watchdog
from slime_opd.config import Config
from slime_opd.config.hf_config import architecture_of
from slime_opd.config.redact import redacted
from slime_opd.config.yaml_file import to_yaml
from slime_opd.data.source import PromptSource
from slime_opd.errors import CheckpointError, ConfigError
from slime_opd.metrics import Metric, values
from slime_opd.observe import console, summary
from slime_opd.observe.metrics import batch_metrics, speed_metrics, time_metrics
from slime_opd.observe.sinks import MetricSinks
from slime_opd.rollout.evaluate import EvalSet
from slime_opd.rollout.loop import BackgroundLoop
from slime_opd.rollout.manager import RolloutManager, student_client
from slime_opd.rollout.recording import Recordings, require_trainable
from slime_opd.stopping import Stopping, during
from slime_opd.teacher.session import TeacherSession
from slime_opd.teacher.teacher import make_teacher
from slime_opd.types import Rollout, StartReport


class Run:
    """The parts of a run. Enter it to start them; leaving it stops exactly what it started."""

    def __init__(
        self,
        config: Config,
        tokenizer: Any,
        source: PromptSource | None,
        eval_sets: list[EvalSet],
        stopping: Stopping | None = None,
    ) -> None:
        self.stopping = stopping or Stopping(grace_s=0, saves=False)  # one that is not installed sees no signal
        self._steps_done = 0
        self.config = without_checkpoints(with_epochs(config, source))
        self._tokenizer, self._source, self._eval_sets = tokenizer, source, eval_sets
        self._run_dir = run_dir(self.config)
        self.log_dir = self._run_dir / "logs"
        self._stack = ExitStack()
        self._weights_version = 0
        self._weights_are_new = True
        # Of the last rollout that was trained on; a checkpoint resumes there.
        self._prompt_cursor: Mapping[str, Any] = {}
        vocabulary = architecture_of(config).get("vocab_size", 0)
        recorded, replayed = config.debug.save_debug_rollout_data, config.debug.load_debug_rollout_data
        self._recorded = Recordings(recorded, vocabulary) if recorded is not None else None
        self._replayed = Recordings(replayed, vocabulary) if replayed is not None else None
        self._last: dict[str, float] = {}
        self.watchdog = Watchdog(config.cluster.watchdog_interval_s, config.cluster.watchdog_timeout_s)

    def __enter__(self) -> Run:
        with self._stack, self.watchdog.waiting_for("starting"):
            self._start()
            self._stack = self._stack.pop_all()
        self._started, self._done = time.monotonic(), self.first_step
        lifetimes.leave_last_words(self._ending(is_finished=False))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if self.stopping.save_first and self.stopping.unsaved and kind is not None and issubclass(kind, SystemExit):
                self.save(self._steps_done)
        finally:
            self.stopping.begin_cleanup()
            try:
                self._stack.close()
            finally:
                console.say(self._ending(is_finished=kind is None))

    def _ending(self, *, is_finished: bool) -> str:
        config, latest = self.config, self._checkpoints.latest
        seconds, total = time.monotonic() - self._started, config.rollout.num_rollout or 0
        progress = summary.Progress(self._done, self.first_step, total, seconds)
        if is_finished:
            return summary.closing(progress, self._last, latest, config.model.hf_checkpoint)
        return summary.stopped(progress, config.checkpoint.save, latest, self._checkpoints.start.path)

    def _start(self) -> None:
        self._choose_start()
        self._open_run_dir()
        self._stack.enter_context(self.watchdog)
        loop = self._stack.enter_context(BackgroundLoop(check=self.watchdog.check))
        self._teacher = self._start_teacher(loop)
        self._start_processes()
        if not self.config.replays:
            self._rollouts = self._start_rollouts(loop)

    def _choose_start(self) -> None:
        """Lock --save, and choose the checkpoint to start from. Raises ConfigError where that is not possible."""
        config = self.config
        # Locked before anything in --save is read or moved.
        if config.checkpoint.save is not None and (
            warning := self._stack.enter_context(RunLock(config.checkpoint.save))
        ):
            console.warn(warning)
        try:
            self._checkpoints = RunCheckpoints(config, self._source)
        except CheckpointError as error:
            raise ConfigError(str(error)) from error
        if damaged := directory.problems(self._checkpoints.trainer_config):
            raise ConfigError("\n".join(damaged))
        self.first_step = self._checkpoints.start.step
        saved_cursor = self._checkpoints.run_state.get("prompts", {})
        self._prompt_cursor = saved_cursor if self._source is None else self._source.state()
        if self._replayed is not None:
            self._replayed.require_all(range(self.first_step + 1, (config.rollout.num_rollout or 0) + 1))

    def _open_run_dir(self) -> None:
        """Write the configuration, open the sinks of metrics, and print where the run writes."""
        config = self.config
        self._run_dir.mkdir(parents=True, exist_ok=True)
        (self._run_dir / "config.yaml").write_text(to_yaml(config))
        options = dataclasses.asdict(redacted(config))
        self._sinks = MetricSinks(self._run_dir, config.observe, options, first_step=self.first_step)
        self._stack.callback(self._sinks.close)
        places = summary.Places(
            self._run_dir,
            self._sinks.attempt,
            has_tensorboard=not config.observe.no_tensorboard,
            has_engines=config.needs_engines,
            save=config.checkpoint.save,
            saves=str(self._checkpoints.policy),
            save_hf=config.checkpoint.save_hf,
        )
        console.say(summary.opening(places))

    def _start_teacher(self, loop: BackgroundLoop) -> TeacherSession | None:
        """The teacher that scores this run's rollouts, probed; None without one."""
        teacher = make_teacher(self.config)
        if teacher is None:
            return None
        started = TeacherSession(teacher, loop, self.config.opd.opd_teacher_check_interval)
        self._stack.callback(started.close)
        self.watchdog.add_server("the teacher", teacher.url)
        started.start(self._tokenizer, self.config.model.hf_checkpoint, self._checkpoints.run_state.get("teacher"))
        return started

    def _start_processes(self) -> None:
        """Join Ray, and start the trainers and the engines on it."""
        config, keep = self.config, self._stack
        self.log_dir.mkdir(exist_ok=True)
        ray_processes.write_messages_to(self.log_dir / "ray.log")
        session.join(config.cluster.ray_address)
        placement = session.reserve(config)
        keep.callback(placement.release)
        has_engines, devices = bool(placement.engines), session.devices()
        if devices.has_gpus and (problem := allocator_problem(config, os.environ, has_engines=has_engines)):
            raise ConfigError(problem)
        for_trainers = trainer_environment(config, devices, os.environ, has_engines=has_engines)
        for_engines = engine_environment(config, devices, os.environ)
        if for_trainers or for_engines:
            console.say(summary.environment({"trainers": for_trainers, "engines": for_engines if has_engines else {}}))
        self._trainers: TrainerGroup | None = None
        if placement.trainers:
            trainer_config = with_disk_directory(self._checkpoints.trainer_config, self._run_dir)
            self._trainers = TrainerGroup(trainer_config, placement.trainers, self.watchdog, for_trainers)
            keep.callback(self._trainers.stop)
        self._engines: EngineGroup | None = None
        if has_engines:
            self._engines = EngineGroup(config, placement.engines, self.log_dir, self.watchdog, for_engines)
            keep.callback(self._engines.stop)
        console.say(summary.starting(len(placement.trainers), len(placement.engines)))
        shares_gpus = config.cluster.colocate and placement.has_gpus and self._trainers is not None
        report = start_processes(self._trainers, self._engines, shares_gpus=shares_gpus)
        if self._trainers is not None:
            for warning in report.warnings:
                console.warn(warning)
            self._checkpoints.begin(self._trainers)

    def _start_rollouts(self, loop: BackgroundLoop) -> RolloutManager:
        client = None
        if self._engines is not None:
            client = student_client(self.config, self._engines.url, self._engines.access.key)
        rollouts = RolloutManager(
            self.config,
            self._tokenizer,
            self._source,
            loop,
            client=client,
            teacher=self._teacher,
            eval_sets=self._eval_sets,
            on_sample=lambda sample: self.watchdog.advance(1, "samples"),
        )
        self._stack.callback(rollouts.close)
        return rollouts

    @property
    def steps(self) -> range:
        """The rollouts that are left to do."""
        return range(self.first_step, self.config.rollout.num_rollout or 0)

    @during("generate")
    def generate(self, step: int) -> Rollout:
        """The rollout of `step`: from the engines, from the data set (fine-tuning), or from its recording."""
        if self._replayed is not None:
            started = time.perf_counter()
            rollout = self._replayed.read(step + 1)
            require_trainable(rollout, self.config)
            return dataclasses.replace(rollout, timings={"rollout": time.perf_counter() - started})
        timings = self.update_weights() if self.config.generates else {}
        label = f"rollout {step + 1}/{self.config.rollout.num_rollout}"
        with self.watchdog.waiting_for(label):
            rollout = self._rollouts.generate(step, label, self._weights_version)
        rollout = dataclasses.replace(rollout, timings={**timings, **rollout.timings})
        if self._recorded is not None:
            console.say(f"recorded {self._recorded.write(step + 1, rollout)}")
        return rollout

    @during("train")
    def train(self, step: int, rollout: Rollout) -> dict[str, Metric]:
        """Train on a rollout; returns the metrics of both. With --debug-rollout-only, those of the rollout alone."""
        samples = rollout.samples
        interval = self.config.observe.print_samples_interval
        if interval and not self.config.is_sft and step % interval == 0:
            console.print_samples(samples[:2], self._tokenizer.decode)
        label = f"training {step + 1}/{self.config.rollout.num_rollout}"
        started = time.perf_counter()
        with console.working(label), self.watchdog.waiting_for(label):
            batch, trained = train_rollout(self._trainers, samples, self.config, step / self.config.rollout.num_rollout)
            self._weights_are_new = True
        timings = {**rollout.timings, "train": time.perf_counter() - started}
        self._steps_done, self._prompt_cursor = step + 1, rollout.prompt_cursor
        speed = speed_metrics(timings, int(np.sum(batch.total_lengths)))
        return {**batch_metrics(batch), **trained, **rollout.metrics, **speed}

    def update_weights(self) -> dict[str, float]:
        """Send the trainers' weights to the engines if they are newer; returns the seconds it took, as timings."""
        if not self._weights_are_new or self._engines is None or self._trainers is None:
            return {}
        started = time.perf_counter()
        with self.watchdog.waiting_for("sending weights to the engines"):
            self._weights_version += 1
            self._trainers.update_weights(
                self._engines.urls,
                self._weights_version,
                key=self._engines.access.key,
                check=self.config.weights.check_weight_update_equal,
            )
        self._weights_are_new = False
        return {"update_weights": time.perf_counter() - started}

    @during("evaluate")
    def evaluate(self, step: int) -> dict[str, Metric]:
        """Evaluate the student as it is after `step` rollouts."""
        timings = self.update_weights()
        started = time.perf_counter()
        label = f"evaluation after {step} rollouts"
        with self.watchdog.waiting_for(label):
            metrics = self._rollouts.evaluate(label)
        return {**metrics, **time_metrics({**timings, "evaluate": time.perf_counter() - started})}

    def save_reason(self, done: int) -> str | None:
        """Why a checkpoint is due after `done` rollouts; None where none is."""
        return self._checkpoints.reason(done)

    @during("save")
    def save(self, step: int, reason: str = BY_REQUEST) -> None:
        """Write a checkpoint that continues after `step` rollouts. `reason`: see slime_opd/checkpoint/saves.py."""
        started = time.perf_counter()
        # Not the source's own state: a rollout that was interrupted has taken prompts that were not trained on.
        run_state = {"step": step, "prompts": dict(self._prompt_cursor)}
        if self._teacher is not None:
            run_state["teacher"] = self._teacher.state()
        with self.watchdog.waiting_for(f"saving after {step} rollouts"):
            path = self._checkpoints.save(self._trainers, run_state, reason)
        seconds = time.perf_counter() - started
        self._sinks.log(step, {"perf/save_time": seconds})
        console.say(f"saved {path} in {seconds:.1f} s")
        lifetimes.leave_last_words(self._ending(is_finished=False))

    def log(self, step: int, metrics: dict[str, Metric]) -> None:
        """Print a line about a step or an evaluation, and write all its metrics."""
        record = values(metrics)
        self._sinks.log(step, record)
        self._last |= record
        self._done, total = step, self.config.rollout.num_rollout or 0
        here = step - self.first_step
        left = (time.monotonic() - self._started) / here * (total - step) if here > 0 else 0.0
        console.say(console.step_summary(step, total, record, seconds_left=left))
        lifetimes.leave_last_words(self._ending(is_finished=False))


def start_processes(
    trainers: TrainerGroup | None, engines: EngineGroup | None, *, shares_gpus: bool
) -> StartReport | None:
    """Start trainers and engines and wait for them: at the same time, but one after the other where they share GPUs.

    SGLang sizes its cache by the memory that is free when it starts, which is known once the trainers have loaded.
    """
    starting = engines.begin_start([]) if engines is not None and not shares_gpus else []
    report = None if trainers is None else trainers.finish_start(trainers.begin_start())
    if engines is not None:
        engines.finish_start(engines.begin_start(trainers.gpu_ids()) if shares_gpus else starting)
    return report
