"""Which steps a start of a run has lost, and which it has done twice."""

from __future__ import annotations

import pytest
from drill.steps import check_start, indistinct, missing


@pytest.mark.parametrize(
    ("steps", "saved", "lost", "doubled"),
    [
        ([1, 2, 3], 0, (), ()),
        ([7, 8, 9], 6, (), ()),
        ([], 6, (), ()),
        # Begun anew although step 6 was saved: six steps are done in vain.
        ([1, 2, 3, 4, 5, 6, 7], 6, (), (1, 2, 3, 4, 5, 6)),
        ([1, 2], 6, (), (1, 2)),
        # The checkpoint had step 6, the run goes on with 8.
        ([8, 9], 6, (7,), ()),
        ([7, 9], 6, (8,), ()),
        ([7, 8, 8, 9], 6, (), (8,)),
    ],
)
def test_a_start_resumes_after_the_checkpoint_and_does_each_step_once(steps, saved, lost, doubled):
    check = check_start(steps, saved)
    assert (check.lost, check.doubled) == (lost, doubled)


def test_a_step_without_a_record_is_missing():
    assert missing([1, 2, 2, 3, 5], 6) == (4, 6)
    assert missing([3, 2, 1], 3) == ()


def test_two_records_of_a_step_are_told_apart_by_their_attempt():
    assert indistinct([{"step": 1}, {"step": 2}, {"step": 2}]) == (2,)
    assert indistinct([{"step": 2, "attempt": 1}, {"step": 2, "attempt": 2}]) == ()
    assert indistinct([{"step": 2, "attempt": 1}, {"step": 2, "attempt": 1}]) == (2,)
