"""What a data file holds, in one line: its prompts, their lengths, duplicates and labels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slime_opd.data.entries import Entry


@dataclass(frozen=True)
class Summary:
    """Figures of the prompts that a run uses.

    lengths: tokens of each prompt, int64 [N]. repeated: rows that equal an earlier one in prompt, label and response.
    relabelled: rows whose prompt equals an earlier one, with another label or response. labels: rows that have one.
    """

    lengths: np.ndarray
    repeated: int
    relabelled: int
    labels: int
    has_label_column: bool
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """ "400 prompts, 12 to 371 tokens (median 45), labels in all, 50 duplicates"."""
        count, lengths = len(self.lengths), self.lengths
        parts = [
            f"{counted(count, 'prompt')}, {lengths.min()} to {lengths.max()} tokens (median {int(np.median(lengths))})"
        ]
        if self.has_label_column:
            parts.append(f"labels in {'all' if self.labels == count else self.labels}")
        if self.repeated:
            parts.append(counted(self.repeated, "duplicate"))
        if self.relabelled:
            parts.append(f"{counted(self.relabelled, 'repeated prompt')} with another label or response")
        return ", ".join(parts)


def counted(number: int, noun: str) -> str:
    """ "1 duplicate", "2 duplicates"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def summarize(entries: Sequence[Entry], *, has_label_column: bool, notes: Sequence[str] = ()) -> Summary:
    """Figures of a file's entries, of which there is at least one."""
    prompts = np.asarray([_hash(entry.tokens.tobytes()) for entry in entries], np.uint64)
    rows = np.asarray(
        [_hash(entry.tokens.tobytes(), repr(entry.label).encode(), _bytes(entry.response_tokens)) for entry in entries],
        np.uint64,
    )
    distinct_rows, distinct_prompts = len(np.unique(rows)), len(np.unique(prompts))
    return Summary(
        lengths=np.asarray([len(entry.tokens) for entry in entries]),
        repeated=len(entries) - distinct_rows,
        relabelled=distinct_rows - distinct_prompts,
        labels=sum(entry.label is not None and entry.label.strip() != "" for entry in entries),
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
