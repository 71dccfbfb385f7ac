"""Which tokens are compared: each strategy against Python sets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slime_opd.distill.candidates import STRATEGIES, candidates, overlap

STUDENT = torch.tensor([[7, 2, 5], [1, 2, 3], [1, 2, 3]])
TEACHER = torch.tensor([[5, 9, 7], [3, 1, 2], [4, 5, 6]])


def chosen(ids: torch.Tensor, valid: torch.Tensor) -> list[list[int]]:
    """The valid ids of each row, sorted; twice where an id is valid twice."""
    return [sorted(row[keep].tolist()) for row, keep in zip(ids, valid, strict=True)]


@pytest.mark.parametrize(("strategy", "expected"), [
    ("only_stu", [[2, 5, 7], [1, 2, 3], [1, 2, 3]]),
    ("only_tch", [[5, 7, 9], [1, 2, 3], [4, 5, 6]]),
    ("intersection", [[5, 7], [1, 2, 3], []]),
    ("union", [[2, 5, 7, 9], [1, 2, 3], [1, 2, 3, 4, 5, 6]]),
    ("union-intersection", [[2, 9], [], [1, 2, 3, 4, 5, 6]]),
])  # fmt: skip
def test_strategies_by_hand(strategy, expected):
    ids, valid = candidates(STUDENT, TEACHER, strategy)
    assert chosen(ids, valid) == expected
    assert ids.shape == valid.shape == (3, 6 if strategy.startswith("union") else 3)
    assert valid.dtype == torch.bool


@given(
    rows=st.lists(
        st.tuples(
            st.lists(st.integers(0, 9), min_size=4, max_size=4, unique=True),
            st.lists(st.integers(0, 9), min_size=3, max_size=3, unique=True),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_strategies_are_those_of_sets_for_sizes_that_differ_too(rows):
    student = torch.tensor([one for one, _ in rows], dtype=torch.int32)
    teacher = torch.tensor([other for _, other in rows])
    sets = [(set(one), set(other)) for one, other in rows]
    of_sets = {
        "only_stu": [s for s, _ in sets],
        "only_tch": [t for _, t in sets],
        "intersection": [s & t for s, t in sets],
        "union": [s | t for s, t in sets],
        "union-intersection": [s ^ t for s, t in sets],
    }
    for strategy in STRATEGIES:
        got = chosen(*candidates(student, teacher, strategy))
        assert got == [sorted(one) for one in of_sets[strategy]]
    assert overlap(student, teacher).tolist() == [[i in other for i in one] for one, other in rows]
    assert overlap(teacher, student).tolist() == [[i in one for i in other] for one, other in rows]


@pytest.mark.parametrize("strategy", ["union", "union-intersection"])
def test_a_union_is_the_student_s_ids_then_the_teacher_s(strategy):
    ids, valid = candidates(STUDENT, TEACHER, strategy)
    assert torch.equal(ids, torch.cat([STUDENT, TEACHER], dim=1))
    # What both have is the student's, and not the teacher's again.
    assert not valid[:, 3:][overlap(TEACHER, STUDENT)].any()


def test_a_strategy_of_one_model_needs_the_other_s_ids_not():
    ids, valid = candidates(STUDENT, None, "only_stu")
    assert torch.equal(ids, STUDENT) and valid.all()
    ids, valid = candidates(None, TEACHER, "only_tch")
    assert torch.equal(ids, TEACHER) and valid.all()


def test_an_unknown_strategy_says_which_there_are():
    with pytest.raises(ValueError, match="'both'"):
        candidates(STUDENT, TEACHER, "both")
