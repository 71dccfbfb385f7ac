"""Comparison of runs: a table, and a plot of accuracy and reverse KL against rollouts."""

from __future__ import annotations

import json
from itertools import cycle
from pathlib import Path
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from slime_opd.errors import DataError

# Okabe and Ito's palette, which is safe for colour blindness.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_LINES = ("-", "--", ":", "-.")
_NOTHING = "—"
_NOT_METRICS = {"step", "attempt", "time"}

Curve = tuple[list[float], list[float]]


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The records of a run's metrics.jsonl by step, in order.

    The lines of an attempt (a start of the run) replace those of earlier attempts for all steps after the step at which
    it started. An incomplete last line is skipped, and so are values that are null (not finite). Raises DataError if
    the run has no metrics.
    """
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        raise DataError(f"{path}: not found; a run writes it to its --run-dir")
    records: dict[float, dict[str, float]] = {}
    attempt = 0
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            continue
        record = json.loads(line)
        if record.get("attempt", attempt) != attempt:
            attempt = record["attempt"]
            # An attempt that starts at step 0 repeats the first evaluation too.
            records = {step: values for step, values in records.items() if record["step"] and step <= record["step"]}
        records.setdefault(record["step"], {}).update({name: v for name, v in record.items() if v is not None})
    return [values for _, values in sorted(records.items()) if values.keys() - _NOT_METRICS]


def curve(records: list[dict[str, float]], metric: str) -> Curve:
    """Steps and values of a metric, from the records that have it."""
    points = [(record["step"], record[metric]) for record in records if metric in record]
    return [step for step, _ in points], [value for _, value in points]


def accuracy_curves(records: list[dict[str, float]]) -> dict[str, Curve]:
    """The accuracy curve of each evaluation set, by its name."""
    names = dict.fromkeys(n for record in records for n in record if n.startswith("eval/") and n.endswith("/accuracy"))
    return {name.removeprefix("eval/").removesuffix("/accuracy"): curve(records, name) for name in names}


def summary_table(runs: dict[str, Path]) -> str:
    """A Markdown table of runs: accuracy before and after, reverse KL first and last, median seconds per step.

    A run has one row per evaluation set.
    """
    rows = ["| run | accuracy before | accuracy after | reverse KL first | reverse KL last | seconds per step |"]
    rows.append("| --- | --- | --- | --- | --- | --- |")
    for name, run_dir in runs.items():
        records = read_metrics(run_dir)
        kl, seconds = curve(records, "opd/reverse_kl")[1], curve(records, "perf/step_time")[1]
        others = [*_first_and_last(kl, "{:.3f}"), f"{median(seconds):.2f}" if seconds else _NOTHING]
        curves = accuracy_curves(records) or {"": ([], [])}
        for set_name, (_, accuracies) in curves.items():
            cells = [_label(name, set_name, curves), *_first_and_last(accuracies, "{:.1%}"), *others]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def plot_runs(runs: dict[str, Path], path: Path) -> None:
    """Write a PNG with two panels: held-out accuracy and reverse KL against rollouts."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, run_dir), colour in zip(runs.items(), cycle(_COLOURS), strict=False):
        records = read_metrics(run_dir)
        curves = accuracy_curves(records)
        for (set_name, points), line in zip(curves.items(), cycle(_LINES), strict=False):
            left.plot(
                *points, label=_label(name, set_name, curves), color=colour, linestyle=line, marker="o", markersize=4
            )
        steps, kl = curve(records, "opd/reverse_kl")
        if kl:
            right.plot(steps, kl, label=name, color=colour, linewidth=1.8)
    left.set(title="Accuracy on held-out problems", xlabel="rollouts", ylim=(0, 1.02))
    left.yaxis.set_major_formatter(PercentFormatter(1.0))
    right.set(title="Reverse KL to the teacher, nats per token", xlabel="rollouts")
    # A sampled KL may be 0 or negative, which a log scale cannot show.
    if right.lines and all(value > 0 for line in right.lines for value in line.get_ydata()):
        right.set_yscale("log")
    for axes in (left, right):
        _finish(axes)
    figure.savefig(path, dpi=150)


def _label(run: str, set_name: str, curves: dict[str, Curve]) -> str:
    return f"{run}, {set_name}" if len(curves) > 1 else run


def _first_and_last(values: list[float], form: str) -> list[str]:
    return [form.format(values[0]), form.format(values[-1])] if values else [_NOTHING, _NOTHING]


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False)
    else:
        axes.text(0.5, 0.5, "not measured in these runs", transform=axes.transAxes, ha="center", color="grey")
