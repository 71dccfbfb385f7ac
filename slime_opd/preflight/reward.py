"""Rewards and filters, tried before a run on row 0 with made-up responses."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from slime_opd import lifetimes
from slime_opd.config import Config
from slime_opd.config.check_learning import SLIME_FILTER
from slime_opd.preflight.check_packages import check_custom_functions
from slime_opd.preflight.data import Inputs
from slime_opd.preflight.findings import Findings, attempt
from slime_opd.reward.custom import OPTION as CUSTOM_REWARD
from slime_opd.reward.reward import Reward, compute_reward, make_eval_reward, make_reward
from slime_opd.rollout.dynamic_sampling import OPTION as FILTER
from slime_opd.rollout.trial import FilterTask, RewardTask
from slime_opd.types import Prompt, Sample, Status

_POLL_S = 0.02
_LARGEST_GROUP = 8


def inspect_reward(config: Config, inputs: Inputs, found: Findings) -> None:
    """Call the rewards and the filter of a run as it would, on row 0 of each data set that they are for.

    Functions whose module does not exist are left to the check that reports it.
    """
    missing = " ".join(check_custom_functions(config))
    training = [("--prompt-data", inputs.source.first)] if inputs.source is not None and not config.is_sft else []
    evaluation = [(f"--eval-prompt-data {eval_set.name}", eval_set.prompts[0]) for eval_set in inputs.eval_sets]
    custom = config.reward.custom_rm_path
    if custom is not None and CUSTOM_REWARD not in missing:
        rows = training + ([] if config.evaluation.eval_rm_type is not None else evaluation)
        _try(config, RewardTask(config, tuple(made_up(rows, inputs.tokenizer))), f"{CUSTOM_REWARD} {custom}", found)
    elif custom is None and config.reward.rm_type is not None and training:
        attempt(found, lambda: _try_built_in(make_reward, config, training, inputs.tokenizer))
    if evaluation and (custom is None or config.evaluation.eval_rm_type is not None):
        attempt(found, lambda: _try_built_in(make_eval_reward, config, evaluation, inputs.tokenizer))
    path = config.rollout.dynamic_sampling_filter_path
    if path not in (None, SLIME_FILTER) and FILTER not in missing:
        group = _group(config, training, inputs.tokenizer)
        _try(config, FilterTask(config, group), f"{FILTER} {path}", found)


def made_up(rows: list[tuple[str, Prompt]], tokenizer: Any) -> list[tuple[str, Sample]]:
    """Samples as a run has them, with a description: each row's prompt answered by its label, and by nothing."""
    samples = []
    for name, prompt in rows:
        for description, text in (("its label as the response", prompt.label or "0"), ("an empty response", "")):
            sample = _sample(prompt, text, tokenizer)
            samples.append((f"row 0 of {name} and {description}", sample))
    return samples


def _sample(prompt: Prompt, text: str, tokenizer: Any) -> Sample:
    tokens = tuple(tokenizer([text], add_special_tokens=False, verbose=False)["input_ids"][0]) if text else ()
    sample = Sample(prompt, tokens, text, Status.COMPLETED)
    sample.set("loss_mask", np.ones(len(tokens)))
    sample.set("rollout_log_probs", np.full(len(tokens), -1.0))
    sample.set("truncated", 0.0)
    sample.set("group", prompt.index)
    return sample


def _group(config: Config, rows: list[tuple[str, Prompt]], tokenizer: Any) -> tuple[Sample, ...]:
    """A group of the run's size, up to a few, with rewards of 1 and 0 in turn."""
    group = []
    for number in range(min(config.rollout.n_samples_per_prompt, _LARGEST_GROUP) if rows else 0):
        sample = _sample(rows[0][1], rows[0][1].label or "0", tokenizer)
        sample.set("reward", float(number % 2 == 0))
        group.append(sample)
    return tuple(group)


def _try_built_in(
    make: Callable[[Config], Reward], config: Config, rows: list[tuple[str, Prompt]], tokenizer: Any
) -> str:
    """Reward the label of row 0 with itself: the reward's processes start, and it reads the label."""
    reward = make(config)
    try:
        (where, prompt), *_ = rows
        value = asyncio.run(compute_reward(reward, _sample(prompt, prompt.label or "", tokenizer)))
    finally:
        reward.close()
    hint = "" if value > 0 else "; is --label-key the column of the answers?"
    return f"reward {reward.name}: gives {value:g} when row 0 of {where} is answered with its label{hint}"


def _try(config: Config, task: RewardTask | FilterTask, name: str, found: Findings) -> None:
    limit = config.reward.custom_function_timeout_s
    if limit == 0:
        found.unchecked.append(f"{name}: --custom-function-timeout-s is 0")
        return
    problem = run_trial(task, limit)
    tried = len(task.samples) if isinstance(task, RewardTask) else len(task.group)
    if problem is None and tried:
        found.ok.append(f"{name}: imported, tried on {tried} made-up responses")
    elif problem is None:
        found.unchecked.append(f"{name}: it was imported but not called, for there is no row to call it with")
    else:
        found.problems += [line if line.startswith("--") else f"{name}: {line}" for line in problem.splitlines()]


def run_trial(task: RewardTask | FilterTask, limit_s: float) -> str | None:
    """Run a task in a process of its own, and end its process group. Returns the problem as a sentence, or None."""
    # A warden removes what a killed process leaves, the trial's directory among it.
    lifetimes.own()
    with tempfile.TemporaryDirectory(prefix="slime_opd_trial_") as directory:
        report, output = Path(directory) / "report.json", Path(directory) / "output"
        with output.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "slime_opd.rollout.trial", str(report)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                # The modules that this process can import, in the same order.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
                start_new_session=True,
            )
        try:
            with contextlib.suppress(BrokenPipeError):  # it ended before it read: reported below
                # The pipe stays open: its end tells the process that this one has died.
                process.stdin.write(pickle.dumps(task))
                process.stdin.flush()
            has_ended = _wait(process.pid, limit_s)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        state = json.loads(report.read_text()) if report.exists() else {"stage": "being started"}
        if "problem" in state:
            where = f" ({state['stage']})" if state["stage"].startswith("called") else ""
            return None if state["problem"] is None else f"{state['problem']}{where}"
        if not has_ended:
            return f"not done after {limit_s:g} s while {state['stage']}; --custom-function-timeout-s sets the limit, 0 skips the trial"
        return f"ends its process with code {code} while {state['stage']}{_last_line(output)}"


def _wait(pid: int, limit_s: float) -> bool:
    """Whether a process ends within `limit_s` seconds. It is not reaped, so its group keeps its id until killed."""
    deadline = time.monotonic() + limit_s
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _last_line(output: Path) -> str:
    lines = output.read_text(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"; its last output: {last[:200]}" if last else ""
