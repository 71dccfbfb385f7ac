"""Sinks of metrics: a JSONL file, TensorBoard (unless --no-tensorboard), Weights & Biases (with --use-wandb)."""

from __future__ import annotations

import json
import math
import os
import secrets
import time
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from slime_opd.config.stages import ObserveConfig
from slime_opd.observe import console


class Sink(Protocol):
    """Stores metrics by step."""

    def log(self, step: int, record: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One line per record in metrics.jsonl; a resumed run appends. Numbers that are not finite are written as null.

    `attempt` counts the starts of the run in this directory that logged a record. The first line of an attempt has no
    metrics: its step is the number of rollouts that were done before, whose later lines the attempt replaces.
    """

    def __init__(self, run_dir: Path, first_step: int = 0) -> None:
        path = run_dir / "metrics.jsonl"
        _drop_torn_line(path)
        self.attempt = _last_attempt(path) + 1
        self._file = path.open("a", encoding="utf-8")
        self._first_step: int | None = first_step

    def log(self, step: int, record: dict[str, float]) -> None:
        """Write one line, at once."""
        if self._first_step is not None:
            # Not in __init__: an attempt that fails before its first record replaces no lines.
            first_step, self._first_step = self._first_step, None
            self._write(first_step, {})
        self._write(step, record)

    def _write(self, step: int, record: dict[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
        line = {"step": step, "attempt": self.attempt, "time": time.time(), **finite}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Event files for `tensorboard --logdir RUN_DIR`; steps after `first_step` of earlier attempts are hidden."""

    def __init__(self, run_dir: Path, first_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # A resumed run does not evaluate its first step again; one that starts over does everything again.
        purge_step = first_step + 1 if first_step else 0
        self._make = partial(SummaryWriter, str(run_dir / "tensorboard"), purge_step=purge_step)
        self._writer: SummaryWriter | None = None

    def log(self, step: int, record: dict[str, float]) -> None:
        """Add one point to the curve of every metric."""
        if self._writer is None:
            # Not in __init__: an attempt that fails before its first record hides no steps.
            self._writer = self._make()
        for name, value in record.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Write what is buffered."""
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """A run of wandb's; one that a resumed run continues, by the id that lies in its directory."""

    def __init__(self, run_dir: Path, options: ObserveConfig, config: dict[str, object], attempt: int) -> None:
        import wandb

        self._attempt = attempt

        directory = Path(options.wandb_dir or run_dir)
        directory.mkdir(parents=True, exist_ok=True)
        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        run_id = id_file.read_text()
        if options.wandb_host:
            wandb.login(host=options.wandb_host, relogin=True)
        self._run = wandb.init(
            project=options.wandb_project,
            entity=options.wandb_team,
            group=options.wandb_group,
            name=f"{options.wandb_group}_{run_id}" if options.wandb_group else None,
            mode=options.wandb_mode,
            dir=str(directory),
            id=run_id,
            resume="allow",
            config=config,
        )

    def log(self, step: int, record: dict[str, float]) -> None:
        """Add the record to its step."""
        # Not wandb's own step: an evaluation and a checkpoint are records of a step that was logged before.
        self._run.log({"step": step, "attempt": self._attempt, **record})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


class MetricSinks:
    """All sinks of a run. A sink that cannot start raises; one that fails later is dropped with a warning."""

    def __init__(
        self, run_dir: Path, options: ObserveConfig, config: dict[str, object] | None = None, *, first_step: int = 0
    ) -> None:
        """`config`: the run's options, for services that show them. `first_step`: number of rollouts done before."""
        run_dir.mkdir(parents=True, exist_ok=True)
        lines = JsonLines(run_dir, first_step)
        self.attempt = lines.attempt
        self._sinks: list[Sink] = [lines]
        if not options.no_tensorboard:
            self._sinks.append(TensorBoard(run_dir, first_step))
        if options.use_wandb:
            self._sinks.append(WeightsAndBiases(run_dir, options, config or {}, self.attempt))

    def log(self, step: int, record: dict[str, float]) -> None:
        """Give the record to every sink."""
        for sink in list(self._sinks):
            try:
                sink.log(step, record)
            except OSError as error:
                self._sinks.remove(sink)
                console.warn(f"{type(sink).__name__} failed at step {step} and gets no further metrics: {error}")

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            try:
                sink.close()
            except OSError as error:
                console.warn(f"{type(sink).__name__} could not be closed; its last metrics may be missing: {error}")
        self._sinks = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _drop_torn_line(path: Path) -> None:
    """Remove an incomplete last line, which a killed process may have left."""
    if path.exists():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)


def _last_attempt(path: Path) -> int:
    """The attempt of the last line; 1 if an older version wrote it without one, 0 without any line."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return int(json.loads(lines[-1]).get("attempt", 1)) if lines else 0
