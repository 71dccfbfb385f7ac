"""Reward 1 if a response's final answer is mathematically equal to the label.

math-verify compares the answers. Its time limits use signals, which only a main thread may set, and without a limit an
answer such as `9^{9^{9^{9}}}` is computed forever. So answers are compared in worker processes, which the kernel ends
when a comparison exceeds its time limit.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import queue
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from slime_opd.reward.exact_match import label_of, last_boxed
from slime_opd.types import Sample

logger = logging.getLogger(__name__)

_WORKER = Path(__file__).with_name("math_worker.py")
_END_OF_THOUGHT = "</think>"


class MathReward:
    """1.0 if the answer of a response equals its label, else 0.0.

    The answer is the last `\\boxed{…}` after the model's reasoning (`</think>`). In a response without one, math-verify
    searches for "the answer is …", then for the last number. A comparison that takes longer than `limit_s` seconds
    gives 0.0 and a warning.
    """

    name = "math"

    def __init__(self, *, workers: int | None = None, limit_s: int = 10) -> None:
        count = workers or max(1, min(8, (os.cpu_count() or 1) // 2))
        # Last in, first out: no more workers are started than are busy at the same time.
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        self._workers = [_Worker(limit_s) for _ in range(count)]
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="math-reward")

    async def __call__(self, sample: Sample) -> float:
        label = label_of(sample, self.name)
        answer = sample.response.rpartition(_END_OF_THOUGHT)[2]
        boxed = last_boxed(answer)
        if boxed is not None:
            if boxed.strip() == label.strip():
                return 1.0
            answer = f"\\boxed{{{boxed}}}"
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._compare, label, answer)

    def _compare(self, label: str, answer: str) -> float:
        worker = self._idle.get()
        try:
            return worker.compare(label, answer)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End the worker processes."""
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()


class _Worker:
    """One worker process, started at its first use, and again after it has ended."""

    def __init__(self, limit_s: int) -> None:
        self._limit_s = limit_s
        self._process: subprocess.Popen[str] | None = None

    def compare(self, label: str, answer: str) -> float:
        """1.0 if the answer equals the label, else 0.0."""
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps({"label": label, "answer": answer}) + "\n")
        process.stdin.flush()
        reply = process.stdout.readline()
        if reply:
            return float(reply)
        self._give_up(label, answer, process.wait())
        return 0.0

    def _give_up(self, label: str, answer: str, code: int) -> None:
        """Discard a process that ended without an answer; `code` is its exit code.

        A signal is caused by the comparison: its time limit, too much memory, too deep a stack. A normal exit means
        that the worker itself is broken, and raises RuntimeError.
        """
        self.close()
        if code >= 0:
            raise RuntimeError(f"its worker process exited with code {code}; its own message is in this run's stderr")
        logger.warning(
            "math reward: comparing %.80r with the label %.80r was ended by signal %d (limit: %d s): reward 0",
            answer,
            label,
            -code,
            self._limit_s,
        )

    def _running(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        # In its own session, because a comparison that is ended by a signal to the run's process group would count as a
        # wrong answer. -P keeps this folder off the worker's path: its math.py would hide Python's.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), str(self._limit_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
        )
        return self._process

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()
