"""The prompts, read as the run reads them: every row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slime_opd.config import Config
from slime_opd.config.lengths import context_length
from slime_opd.data.source import PromptSource, read_eval_set
from slime_opd.data.summary import Summary, counted
from slime_opd.preflight.findings import Findings, attempt
from slime_opd.rollout.evaluate import EvalSet

# A rollout that takes every prompt more often than this cannot be meant.
_EPOCHS_PER_ROLLOUT = 100


@dataclass(frozen=True)
class Inputs:
    """The student's tokenizer, the training prompts (None if there are none, or unreadable), the evaluation sets."""

    tokenizer: Any
    source: PromptSource | None
    eval_sets: list[EvalSet]


def inspect_data(config: Config, tokenizer: Any, found: Findings) -> Inputs:
    """Read, render and tokenise every row of training and evaluation files, and compare them with the run's sizes."""
    source = None
    if config.data.prompt_data and not config.replays and _is_file(config.data.prompt_data):
        source = attempt(found, lambda: PromptSource.of_run(config, tokenizer))
    if source is not None:
        _report(found, f"--prompt-data {config.data.prompt_data}", source.summary)
        if problems := size_problems(config, source.summary.lengths):
            found.problems += problems
        else:
            _note(found, size_notes(config, source.summary.lengths))
    eval_sets = []
    arguments = config.evaluation.eval_prompt_data if config.evaluates else ()
    for name, path in zip(arguments[::2], arguments[1::2], strict=False):
        read = attempt(found, lambda n=name, p=path: read_eval_set(n, p, config, tokenizer)) if _is_file(path) else None
        if read is not None:
            prompts, summary = read
            eval_sets.append(EvalSet(name, prompts))
            _report(found, f"--eval-prompt-data {name}", summary)
    return Inputs(tokenizer, source, eval_sets)


def size_problems(config: Config, lengths: np.ndarray) -> list[str]:
    """Batch sizes that the prompts show to be mistakes. `lengths`: tokens of each prompt, [N]."""
    rollout, training, count = config.rollout, config.training, len(lengths)
    batch, problems = rollout.rollout_batch_size or 0, []
    if batch > _EPOCHS_PER_ROLLOUT * count:
        problems.append(
            f"--rollout-batch-size: found {batch}, expected at most {_EPOCHS_PER_ROLLOUT} times the {count} prompts of --prompt-data"
        )
    epochs = config.data.num_epoch
    if epochs is not None and batch > epochs * count:
        problems.append(
            f"--num-epoch {epochs}: the {count} prompts make no whole rollout of --rollout-batch-size {batch}: the run would train nothing"
        )
    packed = training.max_tokens_per_gpu if training.use_dynamic_batch_size else None
    if packed is not None and not config.is_sft and packed <= lengths.min():
        problems.append(
            f"--max-tokens-per-gpu: found {packed}, expected more than the {lengths.min()} tokens of the shortest prompt"
        )
    return problems


def size_notes(config: Config, lengths: np.ndarray) -> list[str]:
    """What the number and the lengths of the prompts, int [N], mean for rollouts and responses."""
    rollout, notes = config.rollout, []
    if (rollout.rollout_batch_size or 0) > len(lengths):
        notes.append(
            f"--rollout-batch-size {rollout.rollout_batch_size} takes some of the {len(lengths)} prompts more than once in a rollout"
        )
    context, longest = context_length(config), rollout.rollout_max_response_len
    if config.is_sft or longest is None or context is None or longest > context:
        return notes
    if cut := int((lengths + longest > context).sum()):
        notes.append(
            f"the context of {context} leaves fewer than --rollout-max-response-len {longest} tokens to {counted(cut, 'prompt')} (to the longest {context - lengths.max()}): their responses are cut there"
        )
    return notes


def _report(found: Findings, name: str, summary: Summary) -> None:
    found.ok.append(f"{name}: {summary}")
    _note(found, summary.notes)


def _note(found: Findings, notes: Iterable[str]) -> None:
    found.notes += notes


def _is_file(file: str) -> bool:
    """Whether the file of `FILE` or `FILE@[a:b]` exists; one that does not is reported by the checks of the options."""
    return Path(file.rpartition("@[")[0] if file.endswith("]") and "@[" in file else file).is_file()
