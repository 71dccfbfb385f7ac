"""A run's steps on stand-ins: a rollout made ahead is reported and saved with its own metrics, times and cursor."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from slime_opd.cluster.run import Run
from slime_opd.config import Config
from slime_opd.config.stages import (
    CheckpointConfig,
    DebugConfig,
    ModelConfig,
    ObserveConfig,
    RolloutConfig,
    TrainingConfig,
)
from slime_opd.metrics import Replicated
from slime_opd.types import Prompt, Rollout, Sample, SampleGroup, Status


def a_rollout(step: int, weights_version: int) -> Rollout:
    prompt = Prompt(step, (1, 2), "")
    sample = Sample(prompt, (3,) * (step + 1), "", Status.COMPLETED)
    sample.set("loss_mask", np.ones(step + 1))
    sample.set("group", step)
    group = SampleGroup(prompt, [sample])
    cursor = {"offset": step + 1}
    return Rollout(
        [group], weights_version, cursor, {"rollout/groups_left_out": Replicated(step)}, {"rollout": 10.0 + step}
    )


class Trainers:
    """Records its weight updates; a step takes no time."""

    def __init__(self) -> None:
        self.updates: list[int] = []

    def score(self, batches: list, progress: float, names: frozenset[str]) -> list[dict]:
        return [{} for _ in batches]

    def step(self, columns: list[dict], progress: float) -> dict:
        return {"train/loss": Replicated(1.0)}

    def update_weights(self, urls: list[str], version: int, *, key: str | None, check: bool) -> None:
        self.updates.append(version)


class SmallRun(Run):
    """A run of stand-ins for the trainers, the engines and the rollouts."""

    def _start(self) -> None:
        self.first_step, self.saved = 0, []
        self._teacher, self._trainers = None, Trainers()
        self._engines = SimpleNamespace(urls=["http://e"], access=SimpleNamespace(key=None))
        self._checkpoints = SimpleNamespace(
            latest=None, start=SimpleNamespace(path=None), save=lambda trainers, state, reason: self.saved.append(state)
        )
        self._sinks = SimpleNamespace(log=lambda step, values: None)
        self._rollouts = SimpleNamespace(
            generate=lambda step, label, weights_version: a_rollout(step, weights_version),
            evaluate=lambda label: {"eval/a/accuracy": Replicated(0.5)},
        )


def options(tmp_path, **more) -> Config:
    return Config(
        rollout=RolloutConfig(num_rollout=9, rollout_batch_size=1),
        checkpoint=CheckpointConfig(save=str(tmp_path)),
        observe=ObserveConfig(print_samples_interval=0),
        **more,
    )


@pytest.fixture
def run(tmp_path):
    with SmallRun(options(tmp_path), None, None, []) as run:
        yield run


def values(metrics: dict) -> dict[str, float]:
    return {name: metric.value for name, metric in metrics.items()}


def test_a_rollout_made_ahead_reports_its_own_metrics_and_times_and_saves_its_own_cursor(run):
    first, second = run.generate(0), run.generate(1)
    trained = values(run.train(0, first))
    assert (trained["rollout/groups_left_out"], trained["perf/rollout_time"]) == (0, 10.0)
    assert trained["perf/step_time"] == pytest.approx(10.0, abs=5) and trained["perf/step_time"] > 10.0
    run.save(1)
    assert run.saved == [{"step": 1, "prompts": {"offset": 1}}]
    trained = values(run.train(1, second))
    assert (trained["rollout/groups_left_out"], trained["perf/rollout_time"]) == (1, 11.0)
    assert "perf/update_weights_time" not in trained  # the weights were sent for the first
    run.save(2)
    assert run.saved[1] == {"step": 2, "prompts": {"offset": 2}}


def test_weights_are_sent_once_to_whoever_needs_them_first_and_their_time_is_reported_there(run):
    rollout = run.generate(0)
    assert (rollout.weights_version, run._trainers.updates) == (1, [1])
    assert set(rollout.timings) == {"update_weights", "rollout"}
    assert "perf/update_weights_time" in run.train(0, rollout)
    assert {"eval/a/accuracy", "perf/update_weights_time", "perf/evaluate_time"} == set(run.evaluate(1))
    rollout = run.generate(1)
    assert (rollout.weights_version, run._trainers.updates) == (2, [1, 2])
    assert set(rollout.timings) == {"rollout"}


def test_a_recorded_rollout_is_replayed_with_its_metrics_and_the_time_of_reading_it(tmp_path):
    (tmp_path / "config.json").write_text('{"vocab_size": 8}')
    path = str(tmp_path / "{rollout_id}.parquet")
    more = {"model": ModelConfig(hf_checkpoint=str(tmp_path)), "training": TrainingConfig(loss_type="sft_loss")}
    recording = options(tmp_path, debug=DebugConfig(save_debug_rollout_data=path), **more)
    with SmallRun(recording, None, None, []) as run:
        written = run.generate(0)
    replaying = options(tmp_path, debug=DebugConfig(load_debug_rollout_data=path), **more)
    with SmallRun(replaying, None, None, []) as run:
        read = run.generate(0)
    assert (read.metrics, read.prompt_cursor) == (written.metrics, written.prompt_cursor)
    assert set(read.timings) == {"rollout"} and read.timings["rollout"] < 10.0 == written.timings["rollout"]
