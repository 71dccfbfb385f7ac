"""Advantages and weights of a rollout: who takes part in what, and that each step's weights add up to 1."""

from __future__ import annotations

import numpy as np
import pytest

from slime_opd.batch.assemble import assemble, split
from slime_opd.config import stages
from slime_opd.config.config import Config
from slime_opd.types import Prompt, Sample, Status

LENGTHS, REWARDS, STEP = (4, 2, 6, 1, 3, 5, 0, 2), (1, 0, 1, 1, 0, 0, 1, 0), 4


def config(*, opd=None, divergence=None, algorithm=None) -> Config:
    return Config(
        rollout=stages.RolloutConfig(rollout_batch_size=2, n_samples_per_prompt=4),
        training=stages.TrainingConfig(global_batch_size=STEP),
        algorithm=stages.AlgorithmConfig(**algorithm or {}),
        opd=stages.OPDConfig(use_opd=True, **{"opd_type": "megatron", "opd_kl_coef": 1.0} | (opd or {})),
        divergence=stages.DivergenceConfig(**{"opd_divergence": "reverse_kl"} | (divergence or {})),
    )


def samples(off_policy=(), failed=None, reward=True) -> list[Sample]:
    """Two groups of four; the second token of every response is not trained."""
    made = []
    for number, length in enumerate(LENGTHS):
        sample = Sample(Prompt(number // 4, (1, 2), ""), tuple(range(length)), "", Status.COMPLETED)
        mask = np.ones(length)
        mask[1:2] = 0
        sample.set("loss_mask", mask)
        sample.set("group", number // 4)
        if reward:
            sample.set("reward", float(REWARDS[number]))
        if number in off_policy:
            sample.set("off_policy", 1.0)
        if failed is not None:
            sample.set("teacher_log_probs", np.full(length, np.nan if number == failed else -1.0))
        made.append(sample)
    return made


def of_sample(batch, name: str, number: int) -> np.ndarray:
    return np.split(batch.columns[name], np.cumsum(LENGTHS)[:-1])[number]


def per_step(values: np.ndarray) -> np.ndarray:
    cut = sum(LENGTHS[:STEP])
    return np.array([values[:cut].sum(), values[cut:].sum()])


def test_a_group_is_normalised_without_the_samples_that_are_not_the_students():
    batch = assemble(samples(off_policy=(0,)), config())
    rewards = np.array(REWARDS[1:4], dtype=np.float64)
    expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
    for number, value in zip((1, 2, 3), expected, strict=True):
        np.testing.assert_allclose(of_sample(batch, "advantages", number), value, rtol=1e-4)
    assert (of_sample(batch, "advantages", 0) == 0).all()


def test_policy_weights_leave_out_what_is_not_the_students_and_the_divergence_counts_all():
    batch = assemble(samples(off_policy=(0, 5)), config())
    np.testing.assert_allclose(per_step(batch.columns["policy_weights"]), 1.0, rtol=1e-6)
    np.testing.assert_allclose(per_step(batch.columns["divergence_base"]), 1.0, rtol=1e-6)
    assert (of_sample(batch, "policy_weights", 0) == 0).all() and (of_sample(batch, "policy_weights", 5) == 0).all()
    assert (of_sample(batch, "divergence_base", 0)[[0, 2, 3]] > 0).all()
    assert of_sample(batch, "divergence_base", 0)[1] == of_sample(batch, "policy_weights", 1)[1] == 0


def test_a_step_of_other_models_responses_alone_has_no_policy_loss():
    batch = assemble(samples(off_policy=(0, 1, 2, 3)), config())
    np.testing.assert_allclose(per_step(batch.columns["policy_weights"]), [0, 1], rtol=1e-6)
    np.testing.assert_allclose(per_step(batch.columns["divergence_base"]), 1.0, rtol=1e-6)
    assert np.isfinite(batch.columns["penalty_weights"]).all()


WEIGHTINGS = [
    {},
    {"opd_reward_beta": 0.5},
    {"opd_pass_rate_weights": (1.0, 1.0)},
    {"opd_reward_beta": 2.0, "opd_pass_rate_weights": (2.0, 0.5)},
]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("off_policy", [(), (0, 5)])
def test_weights_move_the_loss_between_tokens_and_not_its_size(weighting, off_policy):
    batch = assemble(samples(off_policy=off_policy), config(divergence=weighting))
    columns = batch.columns
    np.testing.assert_allclose(per_step(columns["penalty_weights"] * columns["policy_weights"]), 1.0, rtol=1e-5)
    np.testing.assert_allclose(per_step(columns["divergence_weights"] * columns["divergence_base"]), 1.0, rtol=1e-5)


def test_a_right_answer_counts_exp_of_one_over_beta_times_a_wrong_one():
    batch = assemble(samples(), config(divergence={"opd_reward_beta": 0.5}))
    right, wrong = of_sample(batch, "divergence_weights", 0)[0], of_sample(batch, "divergence_weights", 1)[0]
    assert right / wrong == pytest.approx(np.exp(2), rel=1e-5)


def test_prompts_count_by_their_pass_rate():
    batch = assemble(samples(), config(divergence={"opd_pass_rate_weights": (1.0, 1.0)}))
    # Three of four are right in the first group and one of four in the second: the same weight, 3/16, in steps of their own.
    np.testing.assert_allclose(batch.columns["divergence_weights"], 1.0, rtol=1e-5)
    alone = assemble(samples(off_policy=(1,)), config(divergence={"opd_pass_rate_weights": (1.0, 1.0)}))
    # Without its wrong answer the first group is always right: nothing to learn, and no step.
    assert (per_step(alone.columns["divergence_weights"])[0], alone.columns["divergence_weights"][-1]) == (0.0, 1.0)


def test_a_response_that_the_teacher_did_not_score_is_in_no_denominator_of_the_distillation():
    options = {"opd": {"opd_type": "sglang"}, "divergence": {"opd_log_prob_top_k": 4}}
    batch = assemble(samples(failed=2), config(**options))
    assert (of_sample(batch, "divergence_weights", 2) == 0).all()
    columns = batch.columns
    np.testing.assert_allclose(per_step(columns["divergence_weights"] * columns["divergence_base"]), 1.0, rtol=1e-5)
    assert (of_sample(batch, "policy_weights", 2)[[0, 2]] > 0).all(), "its reward still teaches"


def test_what_metrics_are_split_by():
    batch = assemble(samples(), config())
    assert of_sample(batch, "position_third", 2).tolist() == [0, 0, 1, 1, 2, 2]
    assert of_sample(batch, "position_third", 3).tolist() == [0]
    assert of_sample(batch, "correct", 0).tolist() == [1] * 4 and of_sample(batch, "correct", 1).tolist() == [0] * 2
    assert "correct" not in assemble(samples(reward=False), config()).columns


def test_without_a_divergence_there_are_no_weights_of_one():
    batch = assemble(samples(), config(divergence={"opd_divergence": None}))
    assert "penalty_weights" in batch.columns and not {"divergence_base", "divergence_weights"} & set(batch.columns)
    off = assemble(samples(), config(opd={"opd_kl_coef": None}))
    assert "penalty_weights" not in off.columns


def test_ranks_hold_every_sample_once_with_all_its_columns():
    run = config()
    (alone,) = split(assemble(samples(), run), run)
    assert sorted(alone.samples.response_lengths.tolist()) == sorted(LENGTHS)
    assert len(alone.steps) == 2
    np.testing.assert_allclose(alone.samples.columns["divergence_base"].sum(), 2.0, rtol=1e-6)
