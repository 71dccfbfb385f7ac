"""Base advantages: GRPO's groups, whitening, and samples without rewards."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from slime_opd.algorithm.advantages import base_advantages, whiten
from slime_opd.algorithm.estimators import ESTIMATORS
from slime_opd.algorithm.estimators.estimator import EstimatorOptions, Responses
from slime_opd.algorithm.estimators.grpo import group_advantages
from slime_opd.algorithm.estimators.rloo import leave_one_out
from slime_opd.errors import DataError

PLAIN = {
    "estimator": "grpo",
    "whiten_advantages": False,
    "only_penalty": False,
}


def test_a_hand_computed_group():
    # Mean 0.5; deviations ±0.5; unbiased std sqrt(4 · 0.25 / 3) = 0.57735.
    got = group_advantages(torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(got, torch.tensor([1.0, -1.0, 1.0, -1.0]) * 0.5 / 0.57735, rtol=1e-4, atol=0)


def test_groups_in_any_order_equal_brute_force():
    random = np.random.default_rng(0)
    rewards, groups = random.normal(size=24), random.permutation(np.arange(24) % 5) * 11
    got = group_advantages(torch.from_numpy(rewards), torch.from_numpy(groups))
    for group in np.unique(groups):
        mine = rewards[groups == group]
        expected = (mine - mine.mean()) / (mine.std(ddof=1) + 1e-6)
        np.testing.assert_allclose(got.numpy()[groups == group], expected, atol=1e-9)


def test_a_group_of_one_has_advantage_exactly_zero():
    assert group_advantages(torch.tensor([0.1, 0.7]), torch.tensor([0, 1])).tolist() == [0.0, 0.0]


def test_a_group_of_equal_rewards_has_no_advantage():
    assert group_advantages(torch.ones(4), torch.zeros(4, dtype=torch.int64)).tolist() == [0.0] * 4


def test_without_normalisation_rewards_are_the_advantages():
    got = group_advantages(torch.tensor([2.0, 5.0]), torch.tensor([0, 0]), subtract_mean=False, divide_by_std=False)
    assert got.tolist() == [2.0, 5.0]


def test_each_token_has_its_samples_advantage():
    responses = Responses(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), torch.tensor([1, 3]), torch.ones(4), {})
    got = base_advantages(responses, EstimatorOptions(), **PLAIN)
    torch.testing.assert_close(got, torch.tensor([1.0, -1.0, -1.0, -1.0]) * 0.7071, rtol=1e-3, atol=0)


def test_no_reward_at_all_is_no_advantage_and_some_missing_is_an_error():
    nan = float("nan")
    responses = Responses(torch.full((2,), nan), torch.tensor([0, 0]), torch.tensor([1, 1]), torch.ones(2), {})
    assert base_advantages(responses, EstimatorOptions(), **PLAIN).tolist() == [0.0, 0.0]
    some = replace(responses, rewards=torch.tensor([1.0, nan]))
    with pytest.raises(DataError, match="1 of 2 samples have no reward"):
        base_advantages(some, EstimatorOptions(), **PLAIN)


def test_whitening_is_over_unmasked_tokens_alone():
    values, mask = torch.tensor([1.0, 2.0, 3.0, 99.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    torch.testing.assert_close(whiten(values, mask), torch.tensor([-1.0, 0.0, 1.0, 0.0]))


def test_whitening_a_constant_or_nothing_gives_zeros():
    assert whiten(torch.full((3,), 4.0), torch.ones(3)).tolist() == [0.0] * 3
    assert whiten(torch.ones(3), torch.zeros(3)).tolist() == [0.0] * 3


def test_leave_one_out_compares_each_reward_with_the_mean_of_the_others():
    random = np.random.default_rng(0)
    rewards, groups = random.normal(size=24), random.permutation(np.arange(24) % 5) * 11
    got = leave_one_out(torch.from_numpy(rewards), torch.from_numpy(groups)).numpy()
    for sample in range(24):
        others = rewards[(groups == groups[sample]) & (np.arange(24) != sample)]
        assert got[sample] == pytest.approx(rewards[sample] - others.mean(), abs=1e-12)


def test_leave_one_out_by_hand():
    # 3 − (1 + 5) / 2 = 0; 1 − (3 + 5) / 2 = −3; 5 − (3 + 1) / 2 = 3; alone, a reward is its own advantage.
    got = leave_one_out(torch.tensor([3.0, 1.0, 5.0, 0.7]), torch.tensor([4, 4, 4, 9]))
    torch.testing.assert_close(got, torch.tensor([0.0, -3.0, 3.0, 0.7]))


def test_every_estimator_gives_one_advantage_per_token():
    responses = Responses(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), torch.tensor([1, 3]), torch.ones(4), {})
    for estimator in ESTIMATORS:
        got = base_advantages(responses, EstimatorOptions(), **PLAIN | {"estimator": estimator})
        assert got.shape == (4,) and got[0] > 0 and len(set(got[1:].tolist())) == 1 and got[1] == -got[0]
