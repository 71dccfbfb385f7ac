"""Comparison of two tokenizers: whether each id stands for the same text in both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from slime_opd.errors import TeacherMismatch

_EXAMPLES = 3


def compare_tokenizers(student: Any, teacher: Any, teacher_name: str) -> str:
    """Check that two tokenizers agree on every id that both have; returns a sentence about the ids.

    Raises TeacherMismatch with the first ids that stand for different texts.
    """
    ours, theirs = _tokens_by_id(student), _tokens_by_id(teacher)
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        raise TeacherMismatch(f"the teacher's tokenizer ({teacher_name}) shares no id with the student's")
    if any(ours[i] != theirs[i] for i in shared):
        # Tokenizers of different kinds write one token differently (▁the, Ġthe); its text decides.
        compare_texts(shared, decoded(teacher, shared), decoded(student, shared), teacher_name)
    sentence = f"all {len(shared)} ids that its tokenizer shares with the student's are the same tokens"
    alone = [
        f"{len(own)} only the {who}'s, from {min(own)}"
        for who, own in (("student", ours.keys() - theirs.keys()), ("teacher", theirs.keys() - ours.keys()))
        if own
    ]
    return f"{sentence} ({', '.join(alone)})" if alone else sentence


def spread_of_ids(tokenizer: Any, vocabulary_size: int, limit: int) -> list[int]:
    """At most `limit` ids of the whole vocabulary: special tokens first, then ids at even distances.

    The last id of the model's vocabulary is left out: SGLang echoes it as 0.
    """
    last = min(len(tokenizer), vocabulary_size - 1) - 1
    special = sorted(i for i in special_ids(tokenizer) if i <= last)
    chosen = {*special[: limit // 2], last}
    even = np.linspace(0, last, num=min(limit, last + 1) - len(chosen)).round().astype(int).tolist()
    return sorted(chosen | set(even))


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of special and added tokens."""
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}


def decoded(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each id by itself, decoded as SGLang does it."""
    return tokenizer.batch_decode([[i] for i in ids])


def compare_texts(
    ids: Sequence[int], teacher: Sequence[str], student: Sequence[str], teacher_tokenizer: str | None
) -> int:
    """Compare the texts of `ids`; returns their number. Raises TeacherMismatch where the texts of an id differ."""
    rows = zip(ids, teacher, student, strict=True)
    if differing := [row for row in rows if row[1] != row[2]]:
        raise TeacherMismatch(
            f"the teacher's tokenizer ({teacher_tokenizer}) is not the student's: {len(differing)} of {len(ids)} ids compared differ: {_examples(differing)}"
        )
    return len(ids)


def _tokens_by_id(tokenizer: Any) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}


def _examples(differing: Sequence[tuple[int, str, str]]) -> str:
    return "; ".join(
        f"id {i} is {theirs!r} to the teacher and {ours!r} to the student" for i, theirs, ours in differing[:_EXAMPLES]
    )
