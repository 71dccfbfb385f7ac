"""Console output of a run: messages, one line per step, and printed samples."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
from rich.console import Console
from rich.text import Text

from slime_opd.observe.summary import accuracies, duration
from slime_opd.types import Sample

# Lines are not wrapped. The width is used only for the rules between samples; a job log has no terminal width.
CONSOLE = Console(highlight=False, soft_wrap=True, width=None if os.isatty(1) else 100)

# Thresholds of a token's reverse KL from which a printed sample highlights it, and highlights it in red.
_HIGHLIGHT_KL, _RED_KL = 0.5, 2.0

# The metrics of the step line, in order, if the step has them: metric, label, format.
_STEP_PARTS = (
    ("rollout/raw_reward", "reward", "{:.3f}"),
    ("opd/reverse_kl", "reverse KL", "{:.4f}"),
    ("opd/divergence", "divergence", "{:.4f}"),
    ("opd/teacher_fallback_fraction", "unscored", "{:.0%}"),
    ("train/kl_loss", "KL to reference", "{:.4f}"),
    ("train/loss", "loss", "{:.4f}"),
    ("train/entropy", "entropy", "{:.3f}"),
    ("train/grad_norm", "grad norm", "{:.2f}"),
    ("train/lr", "lr", "{:.2g}"),
    ("rollout/response_length", "length", "{:.1f}"),
    ("perf/tokens_per_second", "tokens/s", "{:.0f}"),
)
_TIMES = ("rollout", "train", "update_weights", "evaluate")


def say(message: str) -> None:
    """Print one line."""
    CONSOLE.print(message, markup=False)


def warn(message: str) -> None:
    """Print one line, highlighted and with the prefix `warning: `."""
    CONSOLE.print(f"warning: {message}", markup=False, style="yellow")


def working(message: str) -> AbstractContextManager[object]:
    """Context that shows a spinner with a message; without a terminal it shows nothing."""
    return CONSOLE.status(message) if CONSOLE.is_terminal else nullcontext()


# Metrics that are dropped from the step line of a narrow terminal, in this order; metrics.jsonl has all of them.
_OPTIONAL_METRICS = (
    "train/lr",
    "train/entropy",
    "rollout/response_length",
    "train/grad_norm",
    *(f"perf/{name}_time" for name in _TIMES),
    "perf/tokens_per_second",
)


def step_summary(step: int, total: int, record: dict[str, float], *, seconds_left: float = 0.0) -> str:
    """One line about a step or its evaluation: accuracy, reward, KL, loss, speed, times, and the run's remaining time.

    In a terminal, metrics are dropped until the line fits the width.
    """
    left = f" │ {duration(seconds_left)} left" if seconds_left >= 60 else ""
    line = _summary(step, total, record) + left
    for name in _OPTIONAL_METRICS:
        if not CONSOLE.is_terminal or len(line) <= CONSOLE.width:
            break
        record = {other: value for other, value in record.items() if other != name}
        line = _summary(step, total, record) + left
    return line


def _summary(step: int, total: int, record: dict[str, float]) -> str:
    parts = [f"step {step}/{total}", *accuracies(record)]
    # A fallback fraction of 0 is not shown.
    shown = {name: value for name, value in record.items() if value or name != "opd/teacher_fallback_fraction"}
    parts += [f"{label} {form.format(shown[name])}" for name, label, form in _STEP_PARTS if name in shown]
    times = [
        f"{name.replace('_', ' ')} {record[f'perf/{name}_time']:.1f}s"
        for name in _TIMES
        if f"perf/{name}_time" in record
    ]
    return " │ ".join([*parts, *([" ".join(times)] if times else [])])


def print_samples(samples: Sequence[Sample], decode: Callable[[Sequence[int]], str]) -> None:
    """Print samples for a person to read.

    If a teacher scored a sample, tokens with a large reverse KL (log p_student − log p_teacher, with the engine's own
    log-probs) are highlighted: shaded in a terminal, else written «token 1.2».
    """
    for sample in samples:
        kl = _reverse_kl(sample)
        CONSOLE.rule(f"sample of prompt {sample.prompt.index}", style="dim")
        _print_part("prompt", Text(sample.prompt.text))
        _print_part("response", Text(sample.response) if kl is None else _marked(sample.response_tokens, kl, decode))
        reward = "none" if sample.reward is None else f"{sample.reward:g}"
        label = "" if sample.prompt.label is None else f" (label {sample.prompt.label})"
        author = ", not the student's" if "off_policy" in sample.values else ""
        _print_part("reward", Text(f"{reward}{label}, {sample.status.value}{author}"))
        if kl is not None:
            _print_part("teacher", Text(_kl_summary(sample.response_tokens, kl, decode)))
    CONSOLE.rule(style="dim")


def pieces(tokens: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The text that each token adds to the previous ones; joined, the whole text.

    It differs from the text of each token alone: a character may take several tokens (its text is then at the last of
    them), and some tokenizers drop the leading space of a single token.
    """
    texts: list[str] = []
    # A piece is decoded together with the piece before it, so that its leading space is kept.
    previous_start, start = 0, 0
    for end in range(1, len(tokens) + 1):
        context, text = decode(tokens[previous_start:start]), decode(tokens[previous_start:end])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(tokens):
            texts.append("")
            continue
        texts.append(text[len(context) :])
        previous_start, start = start, end
    return texts


def _reverse_kl(sample: Sample) -> np.ndarray | None:
    """Reverse KL per response token, NaN for masked and unscored tokens; None if no token has a value."""
    teacher, student = sample.values.get("teacher_log_probs"), sample.values.get("rollout_log_probs")
    if teacher is None or student is None:
        return None
    kl = np.where(sample.values.get("loss_mask", np.ones_like(student)) > 0, student - teacher, np.nan)
    return None if np.isnan(kl).all() else kl


def _marked(tokens: Sequence[int], kl: np.ndarray, decode: Callable[[Sequence[int]], str]) -> Text:
    text = Text()
    for piece, token_kl in zip(pieces(tokens, decode), kl.tolist(), strict=True):
        if not token_kl >= _HIGHLIGHT_KL:  # false for NaN
            text.append(piece)
            continue
        # A newline has no visible background.
        shown = piece.replace("\n", "↵")
        if CONSOLE.color_system is None:
            text.append(f"«{shown} {token_kl:.1f}»")
        else:
            text.append(shown, style="black on yellow" if token_kl < _RED_KL else "white on red")
        text.append("\n" * piece.count("\n"))
    return text


def _kl_summary(tokens: Sequence[int], kl: np.ndarray, decode: Callable[[Sequence[int]], str], count: int = 3) -> str:
    """The mean reverse KL, and the `count` highlighted tokens with the largest."""
    descending = np.argsort(-np.nan_to_num(kl, nan=-np.inf), kind="stable").tolist()
    largest = [index for index in descending[:count] if kl[index] >= _HIGHLIGHT_KL]
    text = f"reverse KL {np.nanmean(kl):.3f} per token"
    if largest:
        text += ", largest at " + ", ".join(f"{decode([tokens[i]])!r}, token {i} ({kl[i]:.1f})" for i in largest)
    return text


def _print_part(name: str, text: Text) -> None:
    """Print one part of a sample: its name, then its text, indented."""
    indented = Text("\n" + " " * 10).join(text.split("\n", allow_blank=True))
    CONSOLE.print(Text.assemble((f"{name:<10}", "bold"), indented))
