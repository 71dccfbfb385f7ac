"""The process that tries a user's reward or filter before a run: `python -m slime_opd.rollout.trial REPORT`.

It reads a pickled task from its standard input, and writes its current stage and then the problem, if any, to the file
REPORT. A separate process can be killed when the function hangs, and contains a function that ends its process.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from slime_opd.config import Config
from slime_opd.errors import SlimeOPDError
from slime_opd.hooks import described
from slime_opd.reward.custom import CustomReward
from slime_opd.reward.reward import compute_reward
from slime_opd.rollout.dynamic_sampling import load_filter
from slime_opd.types import Sample


@dataclass(frozen=True)
class RewardTask:
    """Import `--custom-rm-path` and call it on each sample. samples: pairs of a description and a sample."""

    config: Config
    samples: tuple[tuple[str, Sample], ...]

    def run(self, report: Callable[[str], None]) -> None:
        report("being imported")
        reward = CustomReward(self.config.reward.custom_rm_path, self.config)
        for description, sample in self.samples:
            report(f"called with {description}")
            asyncio.run(compute_reward(reward, sample))


@dataclass(frozen=True)
class FilterTask:
    """Import `--dynamic-sampling-filter-path` and call it on a group of samples."""

    config: Config
    group: tuple[Sample, ...]

    def run(self, report: Callable[[str], None]) -> None:
        report("being imported")
        keep = load_filter(self.config.rollout.dynamic_sampling_filter_path, self.config)
        if self.group:
            report(f"called with a group of {len(self.group)} made-up samples")
            keep(self.group)


def main(report_path: str) -> None:
    """Run the task on standard input."""
    task: RewardTask | FilterTask = pickle.load(sys.stdin.buffer)
    _end_with_parent()
    stage = ""

    def report(new_stage: str) -> None:
        nonlocal stage
        stage = new_stage
        write(report_path, {"stage": stage})

    problem = None
    try:
        task.run(report)
    except SlimeOPDError as error:
        problem = str(error)
    except SystemExit as error:
        problem = f"it calls sys.exit({error.code!r})"
    except BaseException as error:
        problem = f"it raises {described(error)}"
    write(report_path, {"stage": stage, "problem": problem})
    sys.stdout.flush()
    # Not `sys.exit`, which would wait for threads that the function left running.
    os._exit(0)


def _end_with_parent() -> None:
    """Kill this process and its group, which it leads, once the other end of standard input is closed."""
    lifeline, nothing = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)

    def wait() -> None:
        os.read(lifeline, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def write(path: str, report: dict[str, str | None]) -> None:
    """Replace the report atomically, so that a reader never sees a part of it."""
    partial = Path(f"{path}.partial")
    partial.write_text(json.dumps(report), encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    main(sys.argv[1])
