"""A run: everything that train.py's loop speaks to, started together and stopped together."""

from __future__ import annotations

import dataclasses
import datetime
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from slime_opd import lifetimes, metrics
from slime_opd.batch.train import train_rollout
from slime_opd.checkpoint import directory
from slime_opd.checkpoint.lock import RunLock
from slime_opd.checkpoint.saves import BY_REQUEST
from slime_opd.cluster import ray_processes, session
from slime_opd.cluster.checkpoints import RunCheckpoints
from slime_opd.cluster.engines import EngineGroup
from slime_opd.cluster.environment import allocator_problem, engine_environment, trainer_environment
from slime_opd.cluster.trainers import TrainerGroup
from slime_opd.cluster.watchdog import Watchdog
from slime_opd.config import Config
from slime_opd.config.hf_config import architecture_of
from slime_opd.config.redact import redacted
from slime_opd.config.yaml_file import to_yaml
from slime_opd.data.source import PromptSource
from slime_opd.errors import CheckpointError, ConfigError
from slime_opd.observe import console, summary
from slime_opd.observe.metrics import batch_metrics
from slime_opd.observe.sinks import MetricSinks
from slime_opd.rollout.evaluate import EvalSet
from slime_opd.rollout.loop import BackgroundLoop
from slime_opd.rollout.recording import Recordings, require_trainable
from slime_opd.rollout.student import StudentRollouts
from slime_opd.stopping import Stopping, during
from slime_opd.teacher.probe import probe
from slime_opd.teacher.recheck import TeacherRecheck
from slime_opd.teacher.sglang import make_teacher
from slime_opd.types import Rollout, StartReport

logger = logging.getLogger(__name__)


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
        self._timings: dict[str, float] = {}
        self._of_rollout: dict[str, metrics.Metric] = {}
        self._weights_version = 0
        self._weights_are_new = True
        # Where the prompts stood after the last rollout that was trained on.
        self._prompts: Mapping[str, Any] = {}
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
        self._prompts = self._checkpoints.run_state.get("prompts", {}) if self._source is None else self._source.state()
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
        config, keep = self.config, self._stack
        # Held before anything in --save is looked at or moved.
        if config.checkpoint.save is not None and (warning := keep.enter_context(RunLock(config.checkpoint.save))):
            console.warn(warning)
        try:
            self._checkpoints = RunCheckpoints(config, self._source)
        except CheckpointError as error:
            raise ConfigError(str(error)) from error
        if damaged := directory.problems(self._checkpoints.trainer_config):
            raise ConfigError("\n".join(damaged))
        self.first_step = self._checkpoints.start.step
        if self._replayed is not None:
            self._replayed.require_all(range(self.first_step + 1, (config.rollout.num_rollout or 0) + 1))
        self._run_dir.mkdir(parents=True, exist_ok=True)
        (self._run_dir / "config.yaml").write_text(to_yaml(config))
        options = dataclasses.asdict(redacted(config))
        self._sinks = MetricSinks(self._run_dir, config.observe, options, first_step=self.first_step)
        keep.callback(self._sinks.close)
        console.say(summary.opening(self._places()))
        keep.enter_context(self.watchdog)
        loop = keep.enter_context(BackgroundLoop(check=self.watchdog.check))
        self._teacher = make_teacher(config) if config.teacher.scores_rollouts and config.generates else None
        self._recheck: TeacherRecheck | None = None
        if self._teacher is not None:
            client, top_k = self._teacher.client, self._teacher.wanted.asked
            keep.callback(lambda: loop.run(client.aclose()))
            self.watchdog.add_server("the teacher", client.url)
            facts = loop.run(probe(client, self._tokenizer, config.model.hf_checkpoint, top_k))
            console.say(str(facts))
            interval = config.opd.opd_teacher_check_interval
            self._recheck = TeacherRecheck(self._teacher, facts.fingerprint, interval, loop.submit)
            keep.callback(self._recheck.close)
            loop.run(self._recheck.compare_saved(self._checkpoints.run_state.get("teacher")))
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
        if config.replays:
            return
        self._rollouts = StudentRollouts(
            config,
            self._tokenizer,
            loop,
            engine_url=self._engines.url if self._engines else None,
            engine_key=self._engines.access.key if self._engines else None,
            num_engines=config.num_engines,
            teacher=self._teacher,
            eval_sets=self._eval_sets,
            on_sample=lambda sample: self.watchdog.advance(1, "samples"),
        )
        keep.callback(self._rollouts.close)

    def _places(self) -> summary.Places:
        options = self.config.checkpoint
        return summary.Places(
            self._run_dir,
            self._sinks.attempt,
            has_tensorboard=not self.config.observe.no_tensorboard,
            has_engines=self.config.needs_engines,
            save=options.save,
            saves=str(self._checkpoints.policy),
            save_hf=options.save_hf,
        )

    @property
    def steps(self) -> range:
        """The rollouts that are left to do."""
        return range(self.first_step, self.config.rollout.num_rollout or 0)

    @during("generate")
    def generate(self, step: int) -> Rollout:
        """One rollout: from the engines, from the data set (fine-tuning), or from its recording."""
        if self._replayed is not None:
            with self._timed("rollout"):
                rollout = self._replayed.read(step + 1)
            require_trainable(rollout, self.config)
            return rollout
        if self._weights_are_new and not self.config.is_sft:
            self.update_weights()
        if self._recheck is not None:
            self._recheck.begin(step)
        label = f"rollout {step + 1}/{self.config.rollout.num_rollout}"
        with self._timed("rollout"), self.watchdog.waiting_for(label):
            before = 0 if self._teacher is None else self._teacher.client.bytes_moved
            groups = self._rollouts.generate(self._source, label)
        if self._teacher is not None:
            tokens = sum(sample.response_length for group in groups for sample in group.samples)
            moved = self._teacher.client.bytes_moved - before
            self._of_rollout["perf/teacher_bytes_per_token"] = metrics.Mean(moved, tokens)
        if self._recheck is not None:
            self._recheck.finish()
            if self._recheck.drift is not None:
                self._of_rollout["opd/teacher_drift"] = metrics.Last(self._recheck.drift)
        if self._rollouts.groups_left_out is not None:
            self._of_rollout["rollout/groups_left_out"] = metrics.Last(self._rollouts.groups_left_out)
        rollout = Rollout(groups, self._weights_version, self._source.state())
        if self._recorded is not None:
            console.say(f"recorded {self._recorded.write(step + 1, rollout)}")
        return rollout

    @during("train")
    def train(self, step: int, rollout: Rollout) -> dict[str, metrics.Metric]:
        """Train on a rollout; returns the metrics of both. With --debug-rollout-only, those of the rollout alone."""
        samples = rollout.samples
        interval = self.config.observe.print_samples_interval
        if interval and not self.config.is_sft and step % interval == 0:
            console.print_samples(samples[:2], self._tokenizer.decode)
        label = f"training {step + 1}/{self.config.rollout.num_rollout}"
        with self._timed("train"), console.working(label), self.watchdog.waiting_for(label):
            batch, trained = train_rollout(self._trainers, samples, self.config, step / self.config.rollout.num_rollout)
        self._weights_are_new = self._weights_are_new or self._trainers is not None
        self._steps_done, self._prompts = step + 1, rollout.prompts
        speed = self._speed(int(np.sum(batch.total_lengths)))
        return {**batch_metrics(batch), **trained, **self._of_rollout, **speed}

    def _speed(self, tokens: int) -> dict[str, metrics.Metric]:
        """Seconds of each part of the step that has just ended, and its tokens per second."""
        times, self._timings = self._timings, {}
        seconds = sum(times.values())
        values = {f"perf/{name}_time": value for name, value in times.items()}
        values |= {"perf/step_time": seconds, "perf/tokens_per_second": tokens / seconds}
        return {name: metrics.Last(value) for name, value in values.items()}

    def update_weights(self) -> None:
        """Bring the engines to the trainer's weights."""
        if self._engines is None or self._trainers is None:
            return
        with self._timed("update_weights"), self.watchdog.waiting_for("sending weights to the engines"):
            self._weights_version += 1
            self._trainers.update_weights(
                self._engines.urls,
                self._weights_version,
                key=self._engines.access.key,
                check=self.config.weights.check_weight_update_equal,
            )
        self._weights_are_new = False

    @during("evaluate")
    def evaluate(self, step: int) -> dict[str, metrics.Metric]:
        """Evaluate the student as it is after `step` rollouts."""
        if self._weights_are_new:
            self.update_weights()
        started = time.perf_counter()
        label = f"evaluation after {step} rollouts"
        with self.watchdog.waiting_for(label):
            accuracies = self._rollouts.evaluate(label)
        return {**accuracies, "perf/evaluate_time": metrics.Last(time.perf_counter() - started)}

    def save_reason(self, done: int) -> str | None:
        """Why a checkpoint is due after `done` rollouts; None where none is."""
        return self._checkpoints.reason(done)

    @during("save")
    def save(self, step: int, reason: str = BY_REQUEST) -> None:
        """Write a checkpoint that continues after `step` rollouts. `reason`: see slime_opd/checkpoint/saves.py."""
        started = time.perf_counter()
        # Not where the source stands now: a rollout that was interrupted has taken prompts that were not trained on.
        run_state = {"step": step, "prompts": dict(self._prompts)}
        if self._recheck is not None:
            run_state["teacher"] = self._recheck.state()
        with self.watchdog.waiting_for(f"saving after {step} rollouts"):
            path = self._checkpoints.save(self._trainers, run_state, reason)
        seconds = time.perf_counter() - started
        self._sinks.log(step, {"perf/save_time": seconds})
        console.say(f"saved {path} in {seconds:.1f} s")
        lifetimes.leave_last_words(self._ending(is_finished=False))

    def log(self, step: int, values: dict[str, metrics.Metric]) -> None:
        """Show one line for a step or an evaluation, and keep every metric of it."""
        record = metrics.values(values)
        self._sinks.log(step, record)
        self._last |= record
        self._done, total = step, self.config.rollout.num_rollout or 0
        here = step - self.first_step
        left = (time.monotonic() - self._started) / here * (total - step) if here > 0 else 0.0
        console.say(console.step_summary(step, total, record, seconds_left=left))
        lifetimes.leave_last_words(self._ending(is_finished=False))

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Count what happens inside as time of the present step."""
        started = time.perf_counter()
        yield
        self._timings[name] = self._timings.get(name, 0.0) + time.perf_counter() - started


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


def run_dir(config: Config) -> Path:
    """Where the run writes what is to be watched."""
    if config.observe.run_dir is not None:
        return Path(config.observe.run_dir)
    if config.checkpoint.save is not None:
        return Path(config.checkpoint.save) / "run"
    return Path("runs").absolute() / datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


def with_disk_directory(config: Config, run_directory: Path) -> Config:
    """The configuration with a directory for --update-weight-transport disk: this run's own unless one is given."""
    directory = config.weights.update_weight_disk_dir or str(run_directory / "weights")
    return dataclasses.replace(config, weights=dataclasses.replace(config.weights, update_weight_disk_dir=directory))


def without_checkpoints(config: Config) -> Config:
    """With --debug-rollout-only, the configuration without the checkpoints that it does not use; else as it is."""
    if not config.debug.debug_rollout_only:
        return config
    return dataclasses.replace(config, checkpoint=type(config.checkpoint)())


def with_epochs(config: Config, source: PromptSource | None) -> Config:
    """`--num-epoch` as a number of rollouts, which is known once the prompts are read."""
    if config.data.num_epoch is None or config.rollout.num_rollout is not None or source is None:
        return config
    rollouts = config.data.num_epoch * len(source) // config.rollout.rollout_batch_size
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, num_rollout=rollouts))
