"""When checkpoints are written, and which are removed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime_opd.checkpoint.saves import SavePolicy, save_policy, superfluous
from slime_opd.config.parser import parse


@pytest.mark.parametrize(
    ("words", "minutes"),
    [
        ("", 30),
        ("--save-interval 5", 0),
        ("--save-interval 5 --save-interval-minutes 7", 7),
        ("--save-interval-minutes 0", 0),
        ("--save-interval-minutes 0.5", 0.5),
    ],
)
def test_the_default_interval_is_by_time_unless_rollouts_are_given(words, minutes):
    assert save_policy(parse(words.split())).minutes == minutes


def test_the_last_rollout_is_always_saved():
    assert SavePolicy(None, 0, 5).reason(5, 0) == "last"
    assert SavePolicy(5, 30, 5).reason(5, 1e9) == "last"


def test_rollouts_and_time_both_trigger_saves():
    policy = SavePolicy(rollouts=3, minutes=2, total=10)
    assert [policy.reason(done, 0) for done in range(1, 7)] == [None, None, "interval", None, None, "interval"]
    assert policy.reason(4, 119) is None and policy.reason(4, 120) == "time"
    assert str(policy) == "every 3 rollouts and every 2 minutes and after the last rollout"


def test_zero_minutes_never_trigger_a_save():
    assert SavePolicy(None, 0, 10).reason(3, 1e9) is None


@given(
    st.dictionaries(st.integers(1, 50), st.sampled_from(("time", "interval", "last", None))),
    st.none() | st.integers(1, 50),
)
def test_only_old_time_triggered_checkpoints_are_removed_and_never_the_latest(checkpoints, latest):
    removed = superfluous(checkpoints, latest)
    by_time = sorted(step for step, made_by in checkpoints.items() if made_by == "time")
    assert latest not in removed
    assert set(by_time) - set(removed) - {latest} == set(by_time[-2:]) - {latest}
    assert all(checkpoints[step] == "time" for step in removed)
