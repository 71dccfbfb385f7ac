"""Schedules over training progress: stages of divergences, ramps, and shares of a sequence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime_opd.schedule import KINDS, Stage, factor_at, is_chosen, kind_at, parse_ramp, parse_stages


def test_stages_are_parsed_in_order():
    assert parse_stages("forward_kl:0.4,reverse_kl:0.6") == (Stage("forward_kl", 0.4), Stage("reverse_kl", 0.6))
    assert parse_stages(" jsd:1 ") == (Stage("jsd", 1.0),)
    assert parse_stages("jsd:0.3333333, forward_kl:0.3333333, reverse_kl:0.3333334")[2].kind == "reverse_kl"


@pytest.mark.parametrize(("text", "expected"), [
    ("", "pairs such as forward_kl:0.4,reverse_kl:0.6"),
    ("forward_kl", "pairs such as"),
    ("forward_kl:half,reverse_kl:0.5", "pairs such as"),
    ("forward_kl:nan,reverse_kl:0.5", "pairs such as"),
    ("forward_kl:0.5,", "pairs such as"),
    (":1", "pairs such as"),
    ("kl:1", "among reverse_kl, forward_kl, jsd, not 'kl'"),
    ("token_reward_direct:1", "not 'token_reward_direct'"),
    ("forward_kl:0.4,reverse_kl:0.5", "add up to 1"),
    ("forward_kl:1.5,reverse_kl:-0.5", "shares above 0"),
    ("forward_kl:0,reverse_kl:1", "shares above 0"),
])  # fmt: skip
def test_invalid_stages_are_refused_with_the_expected_form(text, expected):
    with pytest.raises(ValueError, match=r"^expected ") as error:
        parse_stages(text)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_stage_lasts_for_its_share_of_the_run():
    stages = parse_stages("forward_kl:0.4,reverse_kl:0.6")
    assert [kind_at(stages, rollout / 10) for rollout in range(10)] == ["forward_kl"] * 4 + ["reverse_kl"] * 6
    assert kind_at(stages, 1.0) == "reverse_kl"  # a resumed run may go past its end


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_each_stage_has_exactly_its_share_of_rollouts(rollouts):
    total = sum(rollouts)
    kinds = [KINDS[number % len(KINDS)] for number in range(len(rollouts))]
    stages = tuple(Stage(kind, count / total) for kind, count in zip(kinds, rollouts, strict=True))
    expected = [kind for kind, count in zip(kinds, rollouts, strict=True) for _ in range(count)]
    assert [kind_at(stages, rollout / total) for rollout in range(total)] == expected


def test_a_ramp_is_linear_between_its_points_and_constant_outside():
    ramp = parse_ramp("0.1:0, 0.3:1, 0.8:0.5")
    assert ramp == ((0.1, 0.0), (0.3, 1.0), (0.8, 0.5))
    at = {0.0: 0.0, 0.1: 0.0, 0.2: 0.5, 0.3: 1.0, 0.55: 0.75, 0.8: 0.5, 1.0: 0.5}
    assert {progress: factor_at(ramp, progress) for progress in at} == pytest.approx(at)
    assert factor_at(parse_ramp("0.5:2"), 0.1) == factor_at(parse_ramp("0.5:2"), 0.9) == 2.0


@pytest.mark.parametrize(("text", "expected"), [
    ("", "pairs"),
    ("0.5", "pairs"),
    ("start:0,1:1", "pairs of numbers such as 0:0,0.3:1"),
    ("0:inf", "pairs of numbers"),
    ("0:0,0:1", "increasing values"),
    ("0.5:0,0.3:1", "increasing values"),
    ("0:0,1.5:1", "between 0 and 1"),
    ("-0.5:0,1:1", "between 0 and 1"),
    ("nan:1", "between 0 and 1"),
    ("0:-1,1:1", "0 or more"),
])  # fmt: skip
def test_an_invalid_ramp_is_refused_with_the_expected_form(text, expected):
    with pytest.raises(ValueError, match=r"^expected ") as error:
        parse_ramp(text)
    assert expected in str(error.value)


@given(st.integers(0, 20), st.integers(1, 20), st.integers(0, 300))
def test_a_share_is_exact_for_every_prefix_of_a_sequence(part, whole, length):
    share = min(part / whole, 1.0)
    chosen = [is_chosen(index, share) for index in range(length)]
    assert sum(chosen) == min(part, whole) * length // whole


def test_a_share_is_spread_evenly():
    assert [is_chosen(index, 0.25) for index in range(8)] == [False, False, False, True] * 2
