"""Reward 1 if the final answers of response and label are the same text."""

from __future__ import annotations

import re

from slime_opd.errors import DataError
from slime_opd.types import Sample

_BOXED = "\\boxed{"
_ESCAPED_OR_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


class ExactMatch:
    """1.0 if the final answer of the response equals that of the label, else 0.0."""

    name = "exact_match"

    async def __call__(self, sample: Sample) -> float:
        return float(final_answer(sample.response) == final_answer(label_of(sample, self.name)))

    def close(self) -> None:
        """Nothing to end."""


def label_of(sample: Sample, reward: str) -> str:
    """The sample's label. Raises DataError if it has none; `reward` is the reward's name for the message."""
    if sample.prompt.label is None:
        raise DataError(f"reward {reward} needs a label, and prompt {sample.prompt.index} has none; set --label-key")
    return sample.prompt.label


def final_answer(text: str) -> str:
    """The text after the last `####`; else the content of the last `\\boxed{…}`; else the whole text. Stripped."""
    if "####" in text:
        return text.rpartition("####")[2].strip()
    boxed = last_boxed(text)
    return (text if boxed is None else boxed).strip()


def last_boxed(text: str) -> str | None:
    """The content of the last complete `\\boxed{…}`, with matched braces; None without one."""
    end = len(text)
    while (start := text.rfind(_BOXED, 0, end)) >= 0:
        first = start + len(_BOXED)
        depth = 1
        for match in _ESCAPED_OR_BRACE.finditer(text, first):
            depth += {"{": 1, "}": -1}.get(match[0], 0)
            if depth == 0:
                return text[first : match.start()]
        end = start
    return None
