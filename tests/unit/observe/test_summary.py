"""What a run prints at its start and its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from slime_opd.observe.summary import Places, Progress, closing, duration, opening, stopped

PLACES = Places(Path("/run"), 1, has_tensorboard=True, has_engines=True, save="/save", saves="every 2 rollouts")


def test_the_opening_text_names_all_directories():
    text = opening(PLACES)
    for part in ("/run/metrics.jsonl", "tensorboard --logdir /run/tensorboard", "/run/logs", "/save, every 2 rollouts"):
        assert part in text
    assert "attempt" not in text


def test_a_later_attempt_and_a_run_without_checkpoints_say_so():
    text = opening(Places(Path("/run"), 3, has_tensorboard=False, has_engines=False, save=None, saves=""))
    assert (
        "(attempt 3)" in text and "none: --save is not set" in text and "tensorboard" not in text and "logs" not in text
    )


def test_the_closing_text_has_metrics_the_checkpoint_and_commands():
    last = {"eval/math/accuracy": 0.5, "rollout/raw_reward": 0.25, "perf/step_time": 1.0}
    text = closing(Progress(done=6, first=4, total=6, seconds=100), last, "/save/iter_0000006", "/hf")
    assert "6 rollouts (2 of them in this attempt) in 2 min" in text
    assert "math accuracy 50.0%, reward 0.250" in text
    assert "--input-dir /save/iter_0000006" in text and "--origin-hf-dir /hf" in text and "--num-rollout" in text


def test_a_finished_run_that_is_started_again_has_nothing_to_do():
    assert closing(Progress(6, 6, 6, 1), {}, "/c", "/hf").startswith("nothing left to do: all 6 rollouts are done")


@pytest.mark.parametrize(
    ("save", "checkpoint", "expected"),
    [
        ("/save", "/save/c", "the same command continues from it"),
        ("/save", None, "the same command starts from /hf again"),
        (None, None, "--save is not set"),
    ],
)
def test_the_last_line_of_a_stopped_run_names_its_checkpoint(save, checkpoint, expected):
    text = stopped(Progress(5, 0, 12, 60), save, checkpoint, "/hf")
    assert text.startswith("stopped after 5 of 12 rollouts") and expected in text


@pytest.mark.parametrize(("seconds", "text"), [(3, "3 s"), (89, "89 s"), (600, "10 min"), (12000, "3 h 20 min")])
def test_durations_as_text(seconds, text):
    assert duration(seconds) == text
