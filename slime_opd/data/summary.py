"""A summary of a data file in one line: number of prompts, lengths, duplicates and labels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slime_opd.data.entries import Entry


@dataclass(frozen=True)
class Summary:
    """Statistics of the prompts that a run uses.

    `lengths`: tokens of each prompt, int64 [N]. `num_repeated`: rows that equal an earlier row in prompt, label and
    response. `num_relabelled`: rows whose prompt equals that of an earlier row with another label or response.
    `num_labels`: rows with a label.
    """

    lengths: np.ndarray
    num_repeated: int
    num_relabelled: int
    num_labels: int
    has_label_column: bool
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """ "400 prompts, 12 to 371 tokens (median 45), labels in all, 50 duplicates"."""
        count, lengths = len(self.lengths), self.lengths
        parts = [
            f"{counted(count, 'prompt')}, {lengths.min()} to {lengths.max()} tokens (median {int(np.median(lengths))})"
        ]
        if self.has_label_column:
            parts.append(f"labels in {'all' if self.num_labels == count else self.num_labels}")
        if self.num_repeated:
            parts.append(counted(self.num_repeated, "duplicate"))
        if self.num_relabelled:
            parts.append(f"{counted(self.num_relabelled, 'repeated prompt')} with another label or response")
        return ", ".join(parts)


def counted(number: int, noun: str) -> str:
    """ "1 duplicate", "2 duplicates"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def summarize(entries: Sequence[Entry], *, has_label_column: bool, notes: Sequence[str] = ()) -> Summary:
    """Summary of a file's entries (at least one)."""
    prompts = np.asarray([_hash(entry.tokens.tobytes()) for entry in entries], np.uint64)
    rows = np.asarray(
        [_hash(entry.tokens.tobytes(), repr(entry.label).encode(), _bytes(entry.response_tokens)) for entry in entries],
        np.uint64,
    )
    distinct_rows, distinct_prompts = len(np.unique(rows)), len(np.unique(prompts))
    return Summary(
        lengths=np.asarray([len(entry.tokens) for entry in entries]),
        num_repeated=len(entries) - distinct_rows,
        num_relabelled=distinct_rows - distinct_prompts,
        num_labels=sum(entry.label is not None and entry.label.strip() != "" for entry in entries),
        has_label_column=has_label_column,
        notes=tuple(notes),
    )


def _hash(*parts: bytes) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return int.from_bytes(digest.digest(), "little")


def _bytes(tokens: np.ndarray | None) -> bytes:
    return b"" if tokens is None else tokens.tobytes()
