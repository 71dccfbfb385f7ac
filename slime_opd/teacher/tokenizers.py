"""Whether two tokenizers mean the same text by the same id."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from slime_opd.errors import TeacherMismatch

_EXAMPLES = 3


def tokenizers_differ(teacher: Any, student: Any) -> list[str]:
    """How the tokenizers of a teacher and of a student differ, one sentence each; empty where every id means the same text.

    Both are Hugging Face tokenizers. All ids are compared, by their entries in the vocabulary and, where those differ in
    spelling alone (as a byte-level and a SentencePiece one do), by the text that they decode to. How text is split does
    not matter: the teacher is given the student's ids.
    """
    theirs, ours = _by_id(teacher), _by_id(student)
    problems = []
    if missing := sorted(theirs.keys() ^ ours.keys()):
        problems.append(
            f"the teacher's tokenizer has {len(theirs):,} ids, the student's {len(ours):,}: {len(missing):,} are in one alone, such as {missing[0]}"
        )
    spelled = sorted(i for i in theirs.keys() & ours.keys() if theirs[i] != ours[i])
    texts = zip(spelled, decoded(teacher, spelled), decoded(student, spelled), strict=True)
    if differing := [row for row in texts if row[1] != row[2]]:
        problems.append(
            f"{len(differing):,} of the {len(ours):,} ids mean another text to the teacher: {_examples(differing)}"
        )
    if teacher.eos_token_id != student.eos_token_id:
        problems.append(
            f"the teacher's end-of-sequence id is {teacher.eos_token_id}, the student's {student.eos_token_id}"
        )
    return problems


def spread_of_ids(tokenizer: Any, vocabulary_size: int, limit: int) -> list[int]:
    """At most `limit` ids from the whole vocabulary: its special tokens first, then ids at even distances.

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
    """Number of ids compared. Raises TeacherMismatch where an id means one text to the teacher and another to the student."""
    rows = zip(ids, teacher, student, strict=True)
    if differing := [row for row in rows if row[1] != row[2]]:
        raise TeacherMismatch(
            f"the teacher's tokenizer ({teacher_tokenizer}) is not the student's: {len(differing)} of {len(ids)} ids compared differ: {_examples(differing)}"
        )
    return len(ids)


def _by_id(tokenizer: Any) -> dict[int, str]:
    return {i: token for token, i in tokenizer.get_vocab().items()}


def _examples(differing: Sequence[tuple[int, str, str]]) -> str:
    return "; ".join(
        f"id {i} is {theirs!r} to the teacher and {ours!r} to the student" for i, theirs, ours in differing[:_EXAMPLES]
    )
