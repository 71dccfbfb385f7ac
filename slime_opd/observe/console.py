"""What a person reads while a run goes: one line per step, and now and then a sample."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
from rich.console import Console
from rich.text import Text

from slime_opd.observe.summary import duration
from slime_opd.types import Sample

# Lines are left whole. In a job log there is no terminal to ask for its width; only rules between samples have one.
CONSOLE = Console(highlight=False, soft_wrap=True, width=None if os.isatty(1) else 100)

# Reverse KL of a token from which a printed sample marks it, and marks it in red.
_DISLIKED, _REJECTED = 0.5, 2.0

# What the step line shows, in order, of what the step has: metric, label, format.
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
    """Print one line that stands out."""
    CONSOLE.print(f"warning: {message}", markup=False, style="yellow")


def working(message: str) -> AbstractContextManager[object]:
    """A spinner with a message for as long as something takes; nothing where the output is not a terminal."""
    return CONSOLE.status(message) if CONSOLE.is_terminal else nullcontext()


# What a narrow terminal goes without, in this order; metrics.jsonl has all of it.
_DISPENSABLE = (
    "train/lr",
    "train/entropy",
    "rollout/response_length",
    "train/grad_norm",
    *(f"perf/{name}_time" for name in _TIMES),
    "perf/tokens_per_second",
)


def step_summary(step: int, total: int, record: dict[str, float], *, seconds_left: float = 0.0) -> str:
    """One readable line about a step or its evaluation: accuracy, reward, KL, loss, speed, times, and the time left of the run.

    In a terminal it is cut to the terminal's width by leaving metrics out, never in the middle of one.
    """
    left = f" │ {duration(seconds_left)} left" if seconds_left >= 60 else ""
    line = _summary(step, total, record) + left
    for name in _DISPENSABLE:
        if not CONSOLE.is_terminal or len(line) <= CONSOLE.width:
            break
        record = {other: value for other, value in record.items() if other != name}
        line = _summary(step, total, record) + left
    return line


def _summary(step: int, total: int, record: dict[str, float]) -> str:
    parts = [f"step {step}/{total}"]
    parts += [
        f"{name.removeprefix('eval/').removesuffix('/accuracy')} accuracy {value:.1%}"
        for name, value in record.items()
        if name.startswith("eval/") and name.endswith("/accuracy")
    ]
    # Where nothing goes unscored there is nothing to say of it.
    shown = {name: value for name, value in record.items() if value or name != "opd/teacher_fallback_fraction"}
    parts += [f"{label} {form.format(shown[name])}" for name, label, form in _STEP_PARTS if name in shown]
    times = [
        f"{name.replace('_', ' ')} {record[f'perf/{name}_time']:.1f}s"
        for name in _TIMES
        if f"perf/{name}_time" in record
    ]
    return " │ ".join([*parts, *([" ".join(times)] if times else [])])


def print_samples(samples: Sequence[Sample], decode: Callable[[Sequence[int]], str]) -> None:
    """Print samples as a person would read them.

    Where a teacher scored a sample, the tokens it likes less than the student does are marked by their reverse KL
    (log p_student − log p_teacher, with the engine's own log-probs): shaded in a terminal, else written «token 1.2».
    """
    for sample in samples:
        kl = _reverse_kl(sample)
        CONSOLE.rule(f"sample of prompt {sample.prompt.index}", style="dim")
        _print_part("prompt", Text(sample.prompt.text))
        _print_part("response", Text(sample.response) if kl is None else _marked(sample.response_tokens, kl, decode))
        reward = "none" if sample.reward is None else f"{sample.reward:g}"
        label = "" if sample.prompt.label is None else f" (label {sample.prompt.label})"
        writer = ", not the student's" if "off_policy" in sample.values else ""
        _print_part("reward", Text(f"{reward}{label}, {sample.status.value}{writer}"))
        if kl is not None:
            _print_part("teacher", Text(_verdict(sample.response_tokens, kl, decode)))
    CONSOLE.rule(style="dim")


def pieces(tokens: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The text that each token adds to the ones before it; together they are the whole text.

    Not the text of each token alone: a character may take several tokens (its text is then the last one's), and some
    tokenizers drop the space that a lone token starts with.
    """
    found: list[str] = []
    settled = 0  # tokens whose text is complete; a piece is decoded with those of the piece before it, for their spaces
    before = 0
    for end in range(1, len(tokens) + 1):
        context, text = decode(tokens[before:settled]), decode(tokens[before:end])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(tokens):
            found.append("")
            continue
        found.append(text[len(context) :])
        before, settled = settled, end
    return found


def _reverse_kl(sample: Sample) -> np.ndarray | None:
    """Of each response token, NaN where it does not train or has no score; None where no token has one."""
    teacher, student = sample.values.get("teacher_log_probs"), sample.values.get("rollout_log_probs")
    if teacher is None or student is None:
        return None
    kl = np.where(sample.values.get("loss_mask", np.ones_like(student)) > 0, student - teacher, np.nan)
    return None if np.isnan(kl).all() else kl


def _marked(tokens: Sequence[int], kl: np.ndarray, decode: Callable[[Sequence[int]], str]) -> Text:
    text = Text()
    for piece, doubt in zip(pieces(tokens, decode), kl.tolist(), strict=True):
        if not doubt >= _DISLIKED:  # NaN is not
            text.append(piece)
            continue
        # A line's end has nothing to shade.
        shown = piece.replace("\n", "↵")
        if CONSOLE.color_system is None:
            text.append(f"«{shown} {doubt:.1f}»")
        else:
            text.append(shown, style="black on yellow" if doubt < _REJECTED else "white on red")
        text.append("\n" * piece.count("\n"))
    return text


def _verdict(tokens: Sequence[int], kl: np.ndarray, decode: Callable[[Sequence[int]], str], count: int = 3) -> str:
    verdict = f"reverse KL {np.nanmean(kl):.3f} per token"
    worst = [i for i in np.argsort(-np.nan_to_num(kl, nan=-np.inf), kind="stable").tolist() if kl[i] >= _DISLIKED][
        :count
    ]
    if worst:
        verdict += ", likes least " + ", ".join(f"{decode([tokens[i]])!r} at token {i} ({kl[i]:.1f})" for i in worst)
    return verdict


def _print_part(name: str, text: Text) -> None:
    """One part of a sample beside its name, with its further lines below its first."""
    indented = Text("\n" + " " * 10).join(text.split("\n", allow_blank=True))
    CONSOLE.print(Text.assemble((f"{name:<10}", "bold"), indented))
