"""Metrics reach every sink, and a run that goes on goes on in each."""

from __future__ import annotations

import json

from slime_opd.config.stages import ObserveConfig
from slime_opd.observe.report import curve, read_metrics
from slime_opd.observe.sinks import MetricSinks

OFFLINE = ObserveConfig(no_tensorboard=True, use_wandb=True, wandb_mode="offline", wandb_project="p", wandb_group="g")


def lines(run_dir) -> list[dict]:
    """The records of steps, without the line that begins each attempt."""
    written = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in written if record.keys() - {"step", "attempt", "time"}]


def test_a_record_is_a_line_and_values_that_are_not_finite_are_null(tmp_path):
    with MetricSinks(tmp_path, ObserveConfig(no_tensorboard=True)) as sinks:
        sinks.log(1, {"train/loss": 0.5, "train/lr": float("nan")})
    (record,) = lines(tmp_path)
    assert (record["step"], record["train/loss"], record["train/lr"]) == (1, 0.5, None)


def scalars(run_dir) -> list[tuple[int, float]]:
    """Steps and values of the loss in TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def test_tensorboard_has_a_curve_per_metric(tmp_path):
    with MetricSinks(tmp_path, ObserveConfig()) as sinks:
        sinks.log(1, {"train/loss": 0.5})
        sinks.log(2, {"train/loss": 0.25})
    assert scalars(tmp_path) == [(1, 0.5), (2, 0.25)]


def test_an_incomplete_last_line_is_removed_and_the_run_appends(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1}\n{"step": 2, "tra')
    with MetricSinks(tmp_path, ObserveConfig(no_tensorboard=True)) as sinks:
        sinks.log(2, {"train/loss": 1})
    assert [record["step"] for record in lines(tmp_path)] == [1, 2]


def attempts(run_dir, *starts: tuple[int, list[int]]) -> None:
    """Log the steps of attempts, each given as where it begins and what it logs; the loss is the attempt's number."""
    for attempt, (first_step, steps) in enumerate(starts, start=1):
        with MetricSinks(run_dir, ObserveConfig(), first_step=first_step) as sinks:
            assert sinks.attempt == attempt
            for step in steps:
                sinks.log(step, {"train/loss": float(attempt)})


def test_a_repeated_step_is_another_attempts_and_readers_take_the_last(tmp_path):
    attempts(tmp_path, (0, [0, 1, 2, 3, 4]), (2, [3]))
    assert [(record["attempt"], record["step"]) for record in lines(tmp_path)] == [
        *((1, step) for step in range(5)),
        (2, 3),
    ]
    # Step 4 of the first attempt is superseded, though the second has not come so far yet.
    assert curve(read_metrics(tmp_path), "train/loss") == ([0, 1, 2, 3], [1, 1, 1, 2])


def test_an_attempt_from_step_0_replaces_all_records(tmp_path):
    attempts(tmp_path, (0, [0, 1, 2]), (0, [1]))
    assert curve(read_metrics(tmp_path), "train/loss") == ([1], [2])


def test_an_attempt_without_records_replaces_none(tmp_path):
    attempts(tmp_path, (0, [1, 2]))
    with MetricSinks(tmp_path, ObserveConfig(), first_step=0):
        pass
    assert curve(read_metrics(tmp_path), "train/loss") == ([1, 2], [1, 1])
    assert scalars(tmp_path) == [(1, 1), (2, 1)]


def test_metrics_of_a_version_without_attempts_are_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 0}\n{"step": 2, "train/loss": 0}\n')
    with MetricSinks(tmp_path, ObserveConfig(no_tensorboard=True), first_step=1) as sinks:
        sinks.log(2, {"train/loss": 2.0})
    assert curve(read_metrics(tmp_path), "train/loss") == ([1, 2], [0, 2])


def test_tensorboard_draws_a_repeated_step_once(tmp_path):
    attempts(tmp_path, (0, [0, 1, 2, 3, 4]), (2, [3]))
    assert scalars(tmp_path) == [(0, 1), (1, 1), (2, 1), (3, 2)]


def test_weights_and_biases_keeps_an_offline_run_that_a_resumed_one_continues(tmp_path):
    for step in (1, 2):
        with MetricSinks(tmp_path, OFFLINE, {"optimizer": {"lr": 1e-6}}) as sinks:
            sinks.log(step, {"train/loss": 1 / step})
    run_id = (tmp_path / "wandb_id").read_text()
    written = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert written and all(run_id in path.name for path in written)
    assert any(list(path.glob("*.wandb")) for path in written)
