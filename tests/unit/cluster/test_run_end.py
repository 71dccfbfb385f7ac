"""A run that a signal ends: what is saved, with which prompt cursor. Its parts are stand-ins; the signals are real."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest

from slime_opd.cluster.run import Run
from slime_opd.config import Config
from slime_opd.config.stages import CheckpointConfig, RolloutConfig, TrainingConfig
from slime_opd.stopping import SIGNALS, Stopping
from slime_opd.types import Rollout


class Source:
    """A cursor that counts."""

    offset = 0

    def __len__(self) -> int:
        return 1000

    def state(self) -> dict:
        return {"offset": self.offset}


class Checkpoints:
    """Keeps what would be saved."""

    latest = None
    start = SimpleNamespace(path=None)

    def __init__(self) -> None:
        self.saved: list[dict] = []

    def save(self, trainers: object, run_state: dict, reason: str) -> str:
        self.saved.append(run_state)
        return "somewhere"


class SmallRun(Run):
    """A run whose rollouts take eight prompts each, and which SIGTERM meets in rollout `killed_in` (from 0)."""

    killed_in: int | None = None

    def _start(self) -> None:
        self.first_step, self._checkpoints = 0, Checkpoints()
        self._sinks = SimpleNamespace(log=lambda step, values: None)
        self._teacher = self._engines = self._trainers = None
        self._rollouts = SimpleNamespace(generate=self._take)

    def _take(self, step: int, label: str, weights_version: int) -> Rollout:
        self._source.offset += 8
        if step == self.killed_in:
            os.kill(os.getpid(), signal.SIGTERM)
        return Rollout([], weights_version, self._source.state())


@pytest.fixture
def run(monkeypatch, tmp_path):
    handlers = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGALRM)}
    monkeypatch.setattr(Stopping, "_force_end_after", lambda self, seconds: None)
    config = Config(
        training=TrainingConfig(loss_type="sft_loss"),
        rollout=RolloutConfig(num_rollout=100),
        checkpoint=CheckpointConfig(save=str(tmp_path)),
    )
    yield SmallRun(config, None, Source(), [], stopping=Stopping(grace_s=60, saves=True))
    for number, handler in handlers.items():
        signal.signal(number, handler)


def do_steps(run: Run, count: int) -> int:
    """The exit code of a run of `count` steps."""
    with pytest.raises(SystemExit) as caught, run.stopping, run:
        for step in range(count):
            rollout = run.generate(step)
            with run.stopping.during("train"):
                run._steps_done, run._prompt_cursor = step + 1, rollout.prompt_cursor
        raise SystemExit(0)
    return caught.value.code


def test_after_an_interrupted_rollout_its_prompts_are_used_again_and_finished_steps_are_saved(run):
    run.killed_in = 2
    assert do_steps(run, 10) == 143
    assert run._checkpoints.saved == [{"step": 2, "prompts": {"offset": 16}}]


def test_nothing_is_saved_before_the_first_step_and_nothing_twice(run):
    run.killed_in = 0
    assert do_steps(run, 10) == 143
    assert run._checkpoints.saved == []


def test_a_run_without_a_signal_saves_nothing_at_its_end(run):
    assert do_steps(run, 3) == 0
    assert run._checkpoints.saved == []
