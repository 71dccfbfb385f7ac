"""Live progress of a rollout or an evaluation: a bar in a terminal, periodic lines in a log."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from slime_opd.observe.console import CONSOLE

# Seconds between the lines in a log.
LOG_INTERVAL_S = 10.0


class Progress:
    """Progress through `total` items called `unit` ("samples"), with the rate of their tokens, if any."""

    def __init__(self, label: str, total: int, *, unit: str) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._done, self._tokens = 0, 0
        self._bars: Bars | None = None

    def __enter__(self) -> Self:
        self._started = self._last_line = time.perf_counter()
        if CONSOLE.is_terminal:
            columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
            self._bars = Bars(*columns, TimeElapsedColumn(), console=CONSOLE, transient=True)
            self._task = self._bars.add_task(self._label, total=self._total, rate="")
            self._bars.start()
        return self

    def advance(self, count: int, *, tokens: int = 0) -> None:
        """Note that `count` more items are done, with `tokens` tokens in them."""
        self._done += count
        self._tokens += tokens
        now = time.perf_counter()
        rate = f"{self._tokens / max(now - self._started, 1e-9):.0f} tokens/s" if self._tokens else ""
        if self._bars is not None:
            self._bars.update(self._task, advance=count, rate=rate)
        elif now - self._last_line > LOG_INTERVAL_S:
            self._last_line = now
            CONSOLE.print(f"{self._label}: {self._done}/{self._total} {self._unit}{rate and f', {rate}'}", markup=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
