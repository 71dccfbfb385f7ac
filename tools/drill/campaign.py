"""A whole drill: the shared files, teacher and uninterrupted runs, then further runs until all kills are done."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from drill.kinds import SGLANG_TEACHER
from drill.lineage import Lineage, Setting
from drill.plan import Trial
from drill.results import Result
from drill.stacks import TEACHER_TIMEOUT_S, is_deterministic, make_material

if TYPE_CHECKING:
    from slime_opd.engine.server import EngineProcess


class Campaign:
    """Context manager that makes the files and ends the teacher. `problems`: those that no kill has caused."""

    def __init__(self, directory: Path, *, hang_limit_s: float = 90.0, stop_s: float = 20.0) -> None:
        self.problems: list[str] = []
        self._directory, self._hang_limit_s, self._stop_s = directory, hang_limit_s, stop_s
        self._stack = ExitStack()
        self._lock = threading.Lock()
        self._runs = 0
        self._running: list[Lineage] = []

    def __enter__(self) -> Campaign:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._material = make_material(self._directory)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(
        self,
        batches: Sequence[tuple[str, Sequence[Trial]]],
        jobs: int = 1,
        on_results: Callable[[list[Result]], None] = lambda results: None,
    ) -> list[Result]:
        """Do all kills, with one run per batch and up to `jobs` concurrent runs.

        `on_results` is called with the results of each finished run, never concurrently.
        """
        self._on_results = on_results
        references: dict[str, Path] = {}
        teacher = self._start_teacher() if any(stack == SGLANG_TEACHER for stack, _ in batches) else None
        setting = Setting(
            self._directory,
            self._material,
            teacher.url if teacher else None,
            references,
            self._say,
            self._hang_limit_s,
            stop_s=self._stop_s,
        )
        results: list[Result] = []
        for stack in dict.fromkeys(stack for stack, _ in batches if is_deterministic(stack)):
            reference = Lineage(setting, stack, f"{stack}_uninterrupted")
            results += self._run(reference, deque())
            references[stack] = reference.final_checkpoint()
        with ThreadPoolExecutor(jobs) as pool:
            try:
                for done in pool.map(lambda batch: self._run_batch(setting, *batch), batches):
                    results += done
            except BaseException:
                # The pool waits for its threads. So their runs are killed, and no further runs are started.
                setting.is_interrupted.set()
                for lineage in list(self._running):
                    lineage.kill()
                raise
        if teacher is not None and teacher.exit_code() is not None:
            self.problems.append(f"the teacher, which is not part of the runs, ended with {teacher.exit_code()}")
        return results

    def _run_batch(self, setting: Setting, stack: str, trials: Sequence[Trial]) -> list[Result]:
        """Start runs until all kills of the batch are done: one run, unless it fails to recover or is too short."""
        queue, results = deque(trials), []
        while queue:
            with self._lock:
                self._runs += 1
                name = f"run_{self._runs}_{stack}"
            results += self._run(Lineage(setting, stack, name), queue)
        return results

    def _run(self, lineage: Lineage, queue: deque[Trial]) -> list[Result]:
        self._running.append(lineage)
        try:
            lineage.run(queue)
        finally:
            self._running.remove(lineage)
        for problem in lineage.problems:
            self.problems.append(f"{lineage.name}: {problem}")
            self._say(self.problems[-1])
        with self._lock:
            self._on_results(lineage.results)
        return lineage.results

    def _start_teacher(self) -> EngineProcess:
        # Imported here: it brings torch with it.
        from slime_opd.engine.ports import free_port
        from slime_opd.engine.server import EngineProcess

        log = self._directory / "teacher.log"
        teacher = EngineProcess(self._material.model, port=free_port(), log_path=log)
        self._stack.enter_context(teacher)
        teacher.wait_ready(TEACHER_TIMEOUT_S)
        return teacher

    def _say(self, line: str) -> None:
        print(line, flush=True)
