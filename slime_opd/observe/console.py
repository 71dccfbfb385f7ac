"""What a person reads while a run goes: one line per step, and now and then a sample."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np
from rich.console import Console
from rich.text import Text

from slime_opd.types import Sample

# In a job log there is no terminal to ask for its width; lines are left whole.
CONSOLE = Console(highlight=False, soft_wrap=True, width=None if os.isatty(1) else 240)

# What the step line shows, in order, of what the step has: metric, label, format.
_STEP_PARTS = (
    ("rollout/raw_reward", "reward", "{:.3f}"),
    ("opd/reverse_kl", "reverse KL", "{:.4f}"),
    ("opd/teacher_fallback_fraction", "unscored", "{:.0%}"),
    ("train/kl_loss", "KL to reference", "{:.4f}"),
    ("train/loss", "loss", "{:.4f}"),
    ("train/entropy", "entropy", "{:.3f}"),
    ("train/grad_norm", "grad norm", "{:.2f}"),
    ("train/lr", "lr", "{:.2g}"),
    ("rollout/response_length", "length", "{:.1f}"),
    ("perf/tokens_per_second", "tokens/s", "{:.0f}"),
)
_TIMES = ("rollout", "train", "update_weights", "save", "evaluate")


def say(message: str) -> None:
    """Print one line."""
    CONSOLE.print(message, markup=False)


def warn(message: str) -> None:
    """Print one line that stands out."""
    CONSOLE.print(f"warning: {message}", markup=False, style="yellow")


def step_summary(step: int, total: int, record: dict[str, float]) -> str:
    """One readable line about a step: what it has of reward, KL, loss, speed and time, and evaluation."""
    parts = [f"step {step}/{total}"]
    parts += [
        f"{name.split('/')[1]} accuracy {value:.1%}"
        for name, value in record.items()
        if name.startswith("eval/") and name.endswith("/accuracy")
    ]
    # Where nothing goes unscored there is nothing to say of it.
    shown = {name: value for name, value in record.items() if value or name != "opd/teacher_fallback_fraction"}
    parts += [f"{label} {form.format(shown[name])}" for name, label, form in _STEP_PARTS if name in shown]
    times = [f"{name.replace('_', ' ')} {record[f'perf/{name}_time']:.1f}s" for name in _TIMES if f"perf/{name}_time" in record]
    return " │ ".join([*parts, *([" ".join(times)] if times else [])])


def print_samples(samples: Sequence[Sample], decode: Callable[[Sequence[int]], str]) -> None:
    """Print samples as a person would read them.

    Where a teacher scored a sample, its tokens are shaded by their reverse KL (log p_student − log p_teacher, with the
    engine's own log-probs), and the tokens the teacher likes least are listed.
    """
    for sample in samples:
        CONSOLE.rule(f"sample of prompt {sample.prompt.index}", style="dim")
        CONSOLE.print(Text("prompt    ", style="bold").append(sample.prompt.text, style="not bold"))
        CONSOLE.print(Text("response  ", style="bold").append_text(_response(sample, decode)))
        reward = "none" if sample.reward is None else f"{sample.reward:g}"
        label = "" if sample.prompt.label is None else f" (label {sample.prompt.label})"
        CONSOLE.print(Text("reward    ", style="bold").append(reward + label + f", {sample.status.value}", style="not bold"))
        if worst := _least_liked(sample, decode):
            CONSOLE.print(Text("teacher   ", style="bold").append(f"likes least {worst}", style="not bold"))
    CONSOLE.rule(style="dim")


def _reverse_kl(sample: Sample) -> np.ndarray | None:
    teacher, student = sample.values.get("teacher_log_probs"), sample.values.get("rollout_log_probs")
    return None if teacher is None or student is None else student - teacher


def _response(sample: Sample, decode: Callable[[Sequence[int]], str]) -> Text:
    kl = _reverse_kl(sample)
    text = Text()
    for position, token in enumerate(sample.response_tokens):
        doubt = 0.0 if kl is None or np.isnan(kl[position]) else float(kl[position])
        style = "not bold" if doubt < 0.5 else "black on yellow" if doubt < 2 else "white on red"
        text.append(decode([token]), style=style)
    return text


def _least_liked(sample: Sample, decode: Callable[[Sequence[int]], str], count: int = 3) -> str:
    kl = _reverse_kl(sample)
    if kl is None:
        return ""
    order = [int(i) for i in np.argsort(-np.nan_to_num(kl, nan=-np.inf)) if kl[i] > 0.5][:count]
    return ", ".join(f"{decode([sample.response_tokens[i]])!r} at token {i} (reverse KL {kl[i]:.1f})" for i in order)
