"""Metrics reach every sink, and a run that goes on goes on in each."""

from __future__ import annotations

import json

from slime_opd.config.stages import ObserveConfig
from slime_opd.observe.sinks import MetricSinks

OFFLINE = ObserveConfig(no_tensorboard=True, use_wandb=True, wandb_mode="offline", wandb_project="p", wandb_group="g")


def lines(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_record_is_a_line_and_what_is_not_finite_is_null(tmp_path):
    with MetricSinks(tmp_path, ObserveConfig(no_tensorboard=True)) as sinks:
        sinks.log(1, {"train/loss": 0.5, "train/lr": float("nan")})
    (record,) = lines(tmp_path)
    assert (record["step"], record["train/loss"], record["train/lr"]) == (1, 0.5, None)


def test_tensorboard_has_a_curve_per_metric(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricSinks(tmp_path, ObserveConfig()) as sinks:
        sinks.log(1, {"train/loss": 0.5})
        sinks.log(2, {"train/loss": 0.25})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 0.5), (2, 0.25)]


def test_a_torn_last_line_is_dropped_and_the_run_goes_on_after_it(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "tra')
    with MetricSinks(tmp_path, ObserveConfig(no_tensorboard=True)) as sinks:
        sinks.log(2, {})
    assert [record["step"] for record in lines(tmp_path)] == [1, 2]


def test_weights_and_biases_keeps_an_offline_run_that_a_resumed_one_continues(tmp_path):
    for step in (1, 2):
        with MetricSinks(tmp_path, OFFLINE, {"optimizer": {"lr": 1e-6}}) as sinks:
            sinks.log(step, {"train/loss": 1 / step})
    run_id = (tmp_path / "wandb_id").read_text()
    written = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert written and all(run_id in path.name for path in written)
    assert any(list(path.glob("*.wandb")) for path in written)
