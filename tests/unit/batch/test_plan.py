"""The plan of steps, ranks and micro-batches: nothing lost, nothing twice, ranks even."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime_opd.batch.plan import plan_micro_batches, plan_steps
from slime_opd.errors import DataError


@st.composite
def problems(draw):
    ranks = draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(1, 50), min_size=ranks, max_size=ranks * 12))
    return ranks, np.array(lengths[: len(lengths) // ranks * ranks], dtype=np.int64)


@given(problems(), st.integers(10, 120))
def test_packing_by_tokens(problem, max_tokens):
    ranks, lengths = problem
    plan = plan_micro_batches(lengths, data_parallel_size=ranks, max_tokens=max_tokens)
    check_partition(plan, ranks, len(lengths))
    for micro_batch in (one for of_rank in plan for one in of_rank):
        assert lengths[micro_batch].sum() <= max_tokens or len(micro_batch) == 1


@given(problems(), st.integers(1, 5))
def test_packing_by_samples(problem, size):
    ranks, lengths = problem
    plan = plan_micro_batches(lengths, data_parallel_size=ranks, micro_batch_size=size)
    check_partition(plan, ranks, len(lengths))
    assert all(1 <= len(one) <= size for of_rank in plan for one in of_rank)


def check_partition(plan, ranks, count):
    assert len(plan) == ranks
    assert len({len(of_rank) for of_rank in plan}) == 1
    assert sorted(np.concatenate([one for of_rank in plan for one in of_rank]).tolist()) == list(range(count))


def test_ranks_are_balanced_by_tokens():
    lengths = np.random.default_rng(0).integers(10, 4000, 256)
    plan = plan_micro_batches(lengths, data_parallel_size=4, max_tokens=8192)
    loads = [sum(lengths[one].sum() for one in of_rank) for of_rank in plan]
    assert max(loads) / min(loads) < 1.1


def test_first_fit_fills_micro_batches():
    plan = plan_micro_batches(np.array([6, 4, 5, 5]), data_parallel_size=1, max_tokens=10)
    assert sorted(one.tolist() for one in plan[0]) == [[0, 1], [2, 3]]


def test_samples_that_do_not_divide_are_refused():
    with pytest.raises(DataError, match="5 samples cannot be split over 2"):
        plan_micro_batches(np.ones(5, dtype=np.int64), data_parallel_size=2, max_tokens=10)
    with pytest.raises(DataError, match="do not divide into steps of 4"):
        plan_steps(6, 4)


def test_steps_keep_the_order():
    assert [step.tolist() for step in plan_steps(6, 3)] == [[0, 1, 2], [3, 4, 5]]
