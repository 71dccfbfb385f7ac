"""The text that a run prints at its start (its directories) and at its end (its results). Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# The metrics of the closing summary, if the run has them: name, label, format.
_METRICS = (
    ("rollout/raw_reward", "reward", "{:.3f}"),
    ("opd/reverse_kl", "reverse KL", "{:.4f}"),
    ("opd/divergence", "divergence", "{:.4f}"),
    ("train/loss", "loss", "{:.4f}"),
)


@dataclass(frozen=True)
class Places:
    """The directories that a run writes to. `save` None: no checkpoints. `saves`: when they are written, as text."""

    run_dir: Path
    attempt: int
    has_tensorboard: bool
    has_engines: bool
    save: str | None
    saves: str
    save_hf: str | None = None


def opening(places: Places) -> str:
    """The text that a run prints before it starts."""
    run_dir = places.run_dir.absolute()
    attempt = f" (attempt {places.attempt})" if places.attempt > 1 else ""
    metrics = f"{run_dir / 'metrics.jsonl'}"
    if places.has_tensorboard:
        metrics += f"; tensorboard --logdir {run_dir / 'tensorboard'}"
    rows = [("run directory", f"{run_dir}{attempt}"), ("metrics", metrics)]
    if places.has_engines:
        rows.append(("engine logs", str(run_dir / "logs")))
    where = "none: --save is not set" if places.save is None else f"{Path(places.save).absolute()}, {places.saves}"
    rows.append(("checkpoints", where))
    if places.save_hf is not None:
        rows.append(("for Hugging Face", places.save_hf))
    return _aligned(rows)


def starting(trainers: int, engines: int) -> str:
    """The line that a run prints before its processes start."""
    counts = ((trainers, "trainer"), (engines, "engine"))
    parts = [f"{count} {name}{'s' if count > 1 else ''}" for count, name in counts if count]
    return f"starting {' and '.join(parts)}: each loads its libraries and the model"


def environment(variables: Mapping[str, Mapping[str, str]]) -> str:
    """Lines that show environment variables, given by kind of process ("trainers")."""
    rows = [
        (kind, " ".join(f"{name}={value}" for name, value in env.items())) for kind, env in variables.items() if env
    ]
    return "\n".join(f"environment of the {kind}: {text}" for kind, text in rows)


@dataclass(frozen=True)
class Progress:
    """Progress of a run: `done` of `total` rollouts, `first` of them before this attempt, in `seconds`."""

    done: int
    first: int
    total: int
    seconds: float


def closing(progress: Progress, last: Mapping[str, float], checkpoint: str | None, hf_checkpoint: str | None) -> str:
    """The text that a finished run prints. `last`: each metric's last value; `checkpoint`: the newest checkpoint."""
    here = progress.done - progress.first
    if here <= 0:
        heading = f"nothing left to do: all {progress.total} rollouts are done"
    else:
        part = f" ({here} of them in this attempt)" if progress.first else ""
        heading = f"finished: {progress.done} rollouts{part} in {duration(progress.seconds)}"
    rows = []
    if shown := shown_metrics(last):
        rows.append(("last metrics", shown))
    if checkpoint is not None:
        rows.append(("checkpoint", checkpoint))
        rows.append(("to continue", "the same command with a higher --num-rollout"))
        convert = f"python tools/convert_torch_dist_to_hf.py --input-dir {checkpoint} --output-dir DIR"
        rows.append(("to convert", f"{convert} --origin-hf-dir {hf_checkpoint}"))
    return "\n".join([heading, *([_aligned(rows)] if rows else [])])


def stopped(progress: Progress, save: str | None, checkpoint: str | None, start: str | None) -> str:
    """The line of a run that ends before its last rollout. `checkpoint`: the newest; `start`: the first one."""
    where = f"stopped after {progress.done} of {progress.total} rollouts"
    if save is None:
        return f"{where}: no checkpoint was written, because --save is not set"
    if checkpoint is None:
        return f"{where}: no checkpoint was written yet, so the same command starts from {start} again"
    return f"{where}: the last checkpoint is {checkpoint}; the same command continues from it"


def shown_metrics(last: Mapping[str, float]) -> str:
    """The main metrics as text."""
    parts = [f"{label} {form.format(last[name])}" for name, label, form in _METRICS if name in last]
    return ", ".join([*accuracies(last), *parts])


def accuracies(record: Mapping[str, float]) -> list[str]:
    """The accuracy on each evaluation set as text."""
    return [
        f"{name.removeprefix('eval/').removesuffix('/accuracy')} accuracy {value:.1%}"
        for name, value in record.items()
        if name.startswith("eval/") and name.endswith("/accuracy")
    ]


def duration(seconds: float) -> str:
    """Seconds as text: 45 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _aligned(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name.ljust(width)}  {value}" for name, value in rows)
