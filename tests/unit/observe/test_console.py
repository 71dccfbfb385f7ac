"""The line of a step: whole in a log, and as wide as a terminal at most."""

from __future__ import annotations

import pytest
from rich.console import Console

from slime_opd.observe import console

RECORD = {
    "rollout/raw_reward": 0.5,
    "opd/reverse_kl": 0.1234,
    "train/loss": 1.0,
    "train/entropy": 2.0,
    "train/grad_norm": 3.0,
    "train/lr": 1e-6,
    "rollout/response_length": 100.0,
    "perf/tokens_per_second": 1000.0,
    "perf/rollout_time": 1.0,
    "perf/train_time": 1.0,
}


def test_a_log_has_the_whole_line_and_the_time_left():
    line = console.step_summary(3, 10, RECORD, seconds_left=600)
    for part in ("step 3/10", "reward 0.500", "lr 1e-06", "tokens/s 1000", "rollout 1.0s train 1.0s", "10 min left"):
        assert part in line


def test_less_than_a_minute_left_is_not_shown():
    assert "left" not in console.step_summary(3, 10, RECORD, seconds_left=59)


@pytest.mark.parametrize(
    ("width", "kept", "dropped"), [(200, "lr", ""), (150, "entropy", "lr"), (80, "reverse KL", "length")]
)
def test_a_narrow_terminal_gets_fewer_metrics(monkeypatch, width, kept, dropped):
    monkeypatch.setattr(console, "CONSOLE", Console(force_terminal=True, width=width))
    line = console.step_summary(3, 10, RECORD)
    assert len(line) <= width
    labels = [part.rpartition(" ")[0] for part in line.split(" │ ")]
    assert kept in labels and (not dropped or dropped not in labels)
    assert {"reward", "reverse KL", "loss"} <= set(labels)
