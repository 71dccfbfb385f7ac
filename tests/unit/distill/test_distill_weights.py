"""What counts how much: samples by their reward, prompts by their pass rate, tokens by their importance."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slime_opd.distill.weights import (
    keep_top,
    normalized,
    pass_rate_weights,
    reward_weights,
    statistics,
    token_importance,
)

NAN = float("nan")
answers = st.lists(st.sampled_from([0.0, 1.0, NAN]), min_size=1, max_size=30)


def test_a_right_answer_counts_exp_of_one_over_beta_times_a_wrong_one():
    got = reward_weights(torch.tensor([1.0, 0.0, 0.0, NAN]), beta=0.5)
    wrong = 4 / (math.exp(2) + 3)
    assert got.tolist() == pytest.approx([wrong * math.exp(2), wrong, wrong, wrong], rel=1e-12)


def test_a_small_beta_drops_the_wrong_ones_and_a_large_one_drops_nothing():
    correct = torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert reward_weights(correct, beta=1e-3).tolist() == [2.0, 0.0, 2.0, 0.0]
    assert reward_weights(correct, beta=1e6).tolist() == pytest.approx([1.0] * 4, abs=1e-5)
    assert reward_weights(torch.zeros(3), beta=1e-3).tolist() == pytest.approx([1.0] * 3)  # all wrong: none dropped


@given(answers, st.floats(0.01, 100))
def test_reward_weights_are_on_average_one(correct, beta):
    weights = reward_weights(torch.tensor(correct), beta)
    assert weights.mean().item() == pytest.approx(1.0, rel=1e-9) and (weights >= 0).all()


def test_the_pass_rate_is_that_of_the_sample_s_own_prompt():
    # Group 7: two of four right. Group 3: one of one, group 5: none of two.
    groups = torch.tensor([7, 3, 7, 5, 7, 5, 7])
    correct = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    assert pass_rate_weights(correct, groups, 1, 1).tolist() == [0.25, 0.0, 0.25, 0.0, 0.25, 0.0, 0.25]
    assert pass_rate_weights(correct, groups, 0, 2).tolist() == [0.25, 0.0, 0.25, 1.0, 0.25, 1.0, 0.25]
    assert pass_rate_weights(correct, groups, 0, 0).tolist() == [1.0] * 7


@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0, NAN]), st.integers(0, 4)), max_size=30),
       st.floats(0, 3), st.floats(0, 3))  # fmt: skip
def test_pass_rate_weights_are_the_loop_over_groups(samples, alpha, beta):
    of_group = defaultdict(list)
    for correct, group in samples:
        if not math.isnan(correct):
            of_group[group].append(correct)
    rates = [sum(of_group[group]) / max(1, len(of_group[group])) for _, group in samples]
    correct = torch.tensor([correct for correct, _ in samples])
    groups = torch.tensor([group for _, group in samples], dtype=torch.int64)
    got = pass_rate_weights(correct, groups, alpha, beta)
    assert got.tolist() == pytest.approx([rate**alpha * (1 - rate) ** beta for rate in rates], rel=1e-9, abs=1e-12)


def test_importance_is_the_soft_or_of_entropy_and_divergence():
    entropies, divergences = torch.tensor([0.0, 2.0, 0.0, 0.7, 0.0]), torch.tensor([0.0, 0.0, 2.0, 0.3, 1e-6])
    got = token_importance(entropies.double(), divergences.double())
    h, d = 1 - (-entropies.double()).exp(), 1 - (-divergences.double()).exp()
    torch.testing.assert_close(got, 1 - (1 - h) * (1 - d), rtol=1e-9, atol=1e-12)
    assert got[0] == 0.0
    # Confident and wrong counts as much as unsure: a product of the two axes would drop it.
    assert got[2] == got[1] > 0.8


def test_the_top_share_of_counted_tokens_is_kept():
    scores = torch.tensor([0.9, 0.1, 0.8, 0.7, 0.99, 0.2])
    counted = torch.tensor([True, True, True, True, False, True])
    assert keep_top(scores, counted, 0.4).tolist() == [1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert keep_top(scores, counted, 0.41).tolist() == [1.0, 0.0, 1.0, 1.0, 0.0, 0.0]  # 2.05 rounds up
    assert keep_top(scores, counted, 1.0).tolist() == counted.float().tolist()
    assert keep_top(scores, counted, 1e-12).tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]  # at least one
    assert keep_top(scores, torch.zeros(6, dtype=torch.bool), 0.5).tolist() == [0.0] * 6


def test_equal_scores_are_kept_in_order():
    assert keep_top(torch.ones(5), torch.ones(5, dtype=torch.bool), 0.5).tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_a_fraction_s_rounding_keeps_no_token_more():
    assert 0.07 * 100 > 7  # 7.000000000000001
    assert keep_top(torch.rand(100), torch.ones(100, dtype=torch.bool), 0.07).sum() == 7


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.booleans()), min_size=1, max_size=40),
       st.integers(1, 20))  # fmt: skip
def test_the_number_kept_is_exact_and_none_left_out_scores_higher(tokens, twentieths):
    scores, counted = torch.tensor([score for score, _ in tokens]), torch.tensor([here for _, here in tokens])
    kept = keep_top(scores, counted, twentieths / 20)
    assert int(kept.sum()) == -(-twentieths * int(counted.sum()) // 20)
    assert not kept[~counted].any()
    left_out = counted & (kept == 0)
    if left_out.any():
        assert scores[left_out].max() <= scores[kept > 0].min()


def test_normalized_weights_keep_the_size_of_the_step():
    # Σ b w = 0.5·2 + 0.25·4 + 0.25·0 = 2.
    got = normalized(torch.tensor([2.0, 4.0, 0.0]), torch.tensor([0.5, 0.25, 0.25]))
    assert got.tolist() == [1.0, 2.0, 0.0] and got.dtype == torch.float32
    assert normalized(torch.zeros(3), torch.ones(3)).tolist() == [0.0] * 3
    assert normalized(torch.tensor([0.0, 5.0]), torch.tensor([1.0, 0.0])).tolist() == [0.0, 0.0]


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 1)), min_size=1, max_size=50))
def test_normalized_weights_add_up_to_one_whatever_their_scale(tokens):
    weights = torch.tensor([weight for weight, _ in tokens], dtype=torch.float64)
    base = torch.tensor([one for _, one in tokens], dtype=torch.float64)
    total = (weights * base).sum().item()
    if total < 1e-6:
        return
    got = normalized(weights, base)
    assert (got.double() * base).sum().item() == pytest.approx(1.0, rel=1e-6)
    torch.testing.assert_close(normalized(1000 * weights, base), got)


def test_statistics_are_of_tokens_that_count():
    got = statistics(torch.tensor([9.0, 1.0, 3.0]), torch.tensor([0.0, 0.5, 0.5]))
    # (0.5 + 1.5)² / (1 · (0.5 + 4.5)) = 4 / 5.
    assert (got.minimum, got.maximum) == (1.0, 3.0) and got.effective_share == pytest.approx(0.8)
    assert statistics(torch.full((4,), 7.0), torch.rand(4) + 0.1).effective_share == pytest.approx(1.0)
    assert statistics(torch.tensor([0.0, 0.0, 0.0, 2.0]), torch.ones(4)).effective_share == pytest.approx(0.25)


def test_statistics_of_nothing():
    got = statistics(torch.ones(2), torch.zeros(2))
    assert all(math.isnan(value) for value in (got.minimum, got.maximum, got.effective_share))
    assert statistics(torch.zeros(2), torch.ones(2)).effective_share == 0.0
