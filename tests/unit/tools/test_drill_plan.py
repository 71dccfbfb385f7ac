"""Which kills a drill does: the same for the same seed, every kind, stack and phase in turn."""

from __future__ import annotations

from collections import Counter

import pytest
from drill.kinds import ALL_STACKS, KINDS, PHASES_OF_SFT, SFT, SGLANG_TEACHER, Phase, on_stacks
from drill.plan import batches, plan

ALL = list(KINDS.values())


def test_the_same_seed_gives_the_same_kills_and_another_seed_others():
    assert plan(100, 3, ALL) == plan(100, 3, ALL)
    assert plan(100, 3, ALL) != plan(100, 4, ALL)


@pytest.mark.parametrize("seed", range(5))
def test_a_hundred_kills_have_every_kind_equally_often_and_every_stack_and_phase(seed):
    trials = plan(100, seed, ALL)
    counts = Counter(trial.kind.name for trial in trials)
    assert counts.keys() == KINDS.keys()
    assert max(counts.values()) - min(counts.values()) <= 1
    assert {trial.stack for trial in trials} == set(ALL_STACKS)
    assert {trial.phase for trial in trials} == set(Phase)


def test_a_kill_is_done_on_stacks_and_in_phases_of_its_kind_only():
    for trial in plan(1000, 0, ALL):
        assert trial.stack in trial.kind.stacks
        assert trial.phase in trial.kind.phases
        assert trial.stack != SFT or trial.phase in PHASES_OF_SFT


def test_every_stack_and_phase_of_a_kind_comes_up_before_one_is_repeated():
    kind = KINDS["driver-kill"]
    settings = {(stack, phase) for stack in ALL_STACKS for phase in kind.phases_on(stack)}
    trials = plan(len(settings), 7, [kind])
    assert {(trial.stack, trial.phase) for trial in trials} == settings


def test_every_kind_can_be_done_somewhere():
    for kind in ALL:
        assert all(kind.phases_on(stack) for stack in kind.stacks), kind.name


def test_a_run_gets_at_most_five_kills_of_its_stack_and_none_is_dropped():
    trials = plan(100, 0, ALL)
    found = batches(trials, 5)
    assert sorted(trial.number for _, own in found for trial in own) == list(range(1, 101))
    assert all(1 <= len(own) <= 5 and {trial.stack for trial in own} == {stack} for stack, own in found)


def test_restricting_to_a_stack_removes_kinds_that_do_not_apply():
    names = {kind.name for kind in on_stacks(ALL, [SGLANG_TEACHER])}
    assert "router-kill" not in names and "reward-worker-kill" not in names
    assert {"driver-kill", "engine-scheduler-kill"} <= names


def test_a_missed_kill_is_retried_at_another_moment():
    trial = plan(1, 0, ALL)[0]
    again = trial.again()
    assert (again.number, again.kind, again.phase, again.tries) == (trial.number, trial.kind, trial.phase, 1)
    assert again.fraction != trial.fraction and 0 <= again.fraction < 1
