"""Candidate ids on which two models are compared: top-k sets of either.

Pure. Notation: R response tokens, K ids of a top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor

STRATEGIES = ("only_stu", "only_tch", "intersection", "union", "union-intersection")


def candidates(student_ids: Tensor | None, teacher_ids: Tensor | None, strategy: str) -> tuple[Tensor, Tensor]:
    """Ids of each token's candidates and which of them are valid: [R, K] and bool [R, K], or [R, 2K] of both models'
    ids.

    student_ids, teacher_ids: int [R, K] without repetitions in a row; one that the strategy does not use may be None.
    `union-intersection` is the symmetric difference: what is in one top-k alone (thunlp/OPD's name). An id is valid
    once.
    """
    if strategy == "only_stu":
        return student_ids, torch.ones_like(student_ids, dtype=torch.bool)
    if strategy == "only_tch":
        return teacher_ids, torch.ones_like(teacher_ids, dtype=torch.bool)
    if strategy == "intersection":
        return student_ids, overlap(student_ids, teacher_ids)
    both = torch.cat([student_ids, teacher_ids.to(student_ids.dtype)], dim=1)
    student_valid, new = torch.ones_like(student_ids, dtype=torch.bool), ~overlap(teacher_ids, student_ids)
    if strategy == "union-intersection":
        student_valid = ~overlap(student_ids, teacher_ids)
    elif strategy != "union":
        raise ValueError(f"unknown strategy {strategy!r}; expected one of {', '.join(STRATEGIES)}")
    return both, torch.cat([student_valid, new], dim=1)


def overlap(ids: Tensor, others: Tensor) -> Tensor:
    """Whether each of ids [R, K] is among the same token's others [R, L], bool [R, K]."""
    return (ids[:, :, None] == others[:, None, :]).any(dim=2)
