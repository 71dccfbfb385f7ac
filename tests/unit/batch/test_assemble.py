"""Advantages and weights of a rollout: who takes part in what, and that each step's weights add up to 1."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime_opd.algorithm.estimators import ESTIMATORS
from slime_opd.algorithm.estimators.estimator import Estimator
from slime_opd.batch import assemble as room
from slime_opd.batch.scores import columns_for_assembly
from slime_opd.batch.shares import Shares, plan_shares
from slime_opd.batch.train import train_rollout
from slime_opd.batch.weights import STREAMS, weight_statistics
from slime_opd.config import stages
from slime_opd.config.config import Config
from slime_opd.errors import ConfigError
from slime_opd.objective.options import objective_options
from slime_opd.types import Prompt, RolloutBatch, Sample, Status

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


def assemble(samples: list[Sample], config: Config, **scores: np.ndarray) -> RolloutBatch:
    """With scores of a teacher that is the student where others are not given: its penalty is 0."""
    batch, options = RolloutBatch.from_samples(samples), objective_options(config, 0.0)
    default = np.zeros(int(batch.response_lengths.sum()))
    scored = {name: scores.get(name, default) for name in columns_for_assembly(config, options)}
    return room.assemble(batch.with_columns(scored), config, options)


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
    # Three of four are right in the first group and one of four in the second: the same weight, 3/16, in steps of their
    # own.
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
    batch = assemble(samples(), run)
    (alone,) = plan_shares(batch, run).batches(batch)
    assert sorted(alone.samples.response_lengths.tolist()) == sorted(LENGTHS)
    assert len(alone.steps) == 2
    np.testing.assert_allclose(alone.samples.columns["divergence_base"].sum(), 2.0, rtol=1e-6)


TOTAL = sum(LENGTHS)
STUDENT, TEACHER = np.random.default_rng(0).normal(-2, 1, (2, TOTAL)).astype(np.float32)


@pytest.mark.parametrize("discount", [0.0, 0.5])
def test_the_penalty_of_a_scored_student_is_subtracted_from_the_base_advantages(discount):
    """Over several steps, of the policy that starts the first one; token by token in float64."""
    teacher = TEACHER.copy()
    teacher[2] = np.nan
    opd = {"opd_kl_coef": 0.5, "opd_kl_clamp": 0.8, "opd_kl_discount": discount}
    run = config(opd=opd, divergence={"opd_divergence": None, "opd_reward_beta": 1.0})
    scores = {"log_probs": STUDENT, "penalty_log_probs": STUDENT, "teacher_log_probs": teacher}
    got, base = assemble(samples(), run, **scores), assemble(samples(), run)
    penalised = room.penalised_advantages(got, objective_options(run, 0.0).penalty)
    expected, start = base.columns["advantages"].astype(np.float64), 0
    for length in LENGTHS:
        later = 0.0
        for t in range(start + length - 1, start - 1, -1):
            trains = got.columns["policy_weights"][t] > 0
            signal = np.clip(float(STUDENT[t]) - float(teacher[t]), -0.8, 0.8) * trains
            later = (0.0 if np.isnan(signal) else signal) + discount * later
            if trains and not np.isnan(signal):
                expected[t] -= 0.5 * got.columns["penalty_weights"][t] * later
        start += length
    np.testing.assert_allclose(penalised, expected, atol=1e-5)
    np.testing.assert_array_equal(got.columns["advantages"], base.columns["advantages"])
    assert np.abs(expected - base.columns["advantages"]).max() > 0.1


def test_a_refreshed_student_or_a_single_step_leaves_the_penalty_to_the_step():
    refreshed = config(opd={"opd_refresh_student": True})
    assert objective_options(refreshed, 0.0).penalty_in_step
    assert not {"log_probs", "teacher_log_probs"} & columns_for_assembly(refreshed, objective_options(refreshed, 0.0))
    alone = dataclasses.replace(config(), training=stages.TrainingConfig(global_batch_size=len(LENGTHS)))
    options = objective_options(alone, 0.0)
    assert options.penalty_in_step and not columns_for_assembly(alone, options)
    assert not objective_options(config(), 0.0).penalty_in_step


@pytest.mark.parametrize("weighting", ["soft", "top"])
def test_importance_moves_the_loss_between_tokens_and_not_its_size(weighting):
    run = config(divergence={"opd_token_weighting": weighting, "opd_token_keep_fraction": 0.5})
    scores = {"student_entropy": STUDENT**2, "token_divergence": np.abs(TEACHER)}
    columns = assemble(samples(), run, **scores).columns
    for weights, base in STREAMS.values():
        np.testing.assert_allclose(per_step(columns[weights] * columns[base]), 1.0, rtol=1e-5)
        assert len(np.unique(columns[weights])) > 2 or weighting == "top"
    spread = weight_statistics(assemble(samples(), run, **scores), run)
    assert set(spread) == {"penalty", "divergence"}, "each stream has its own: one does not overwrite the other"
    assert all(0 < stream.effective_share < 1 for stream in spread.values())


@pytest.mark.parametrize("case", ["an off-policy response", "a failed response"])
def test_tokens_that_a_stream_does_not_count_take_no_place_among_the_most_important(case):
    """The most important tokens are of sample 0, which one stream or both do not count."""
    divergence = {"opd_token_weighting": "top", "opd_token_keep_fraction": 0.1}
    entropy = np.ones(TOTAL)
    entropy[: LENGTHS[0]] = 9
    scores = {"student_entropy": entropy, "token_divergence": np.ones(TOTAL)}
    if case == "an off-policy response":
        run, batch_samples, streams = config(divergence=divergence), samples(off_policy=(0,)), ["penalty"]
    else:
        run = config(opd={"opd_type": "sglang"}, divergence=divergence | {"opd_log_prob_top_k": 4})
        batch_samples, streams = samples(failed=0), ["penalty", "divergence"]
        scores["token_divergence"][: LENGTHS[0]] = np.nan
    columns = assemble(batch_samples, run, **scores).columns
    for stream in streams:
        weights, base = STREAMS[stream]
        np.testing.assert_allclose(per_step(columns[weights] * columns[base]), 1.0, rtol=1e-5)
        assert (columns[weights][: LENGTHS[0]] == 0).all()


def test_fine_tuning_over_several_steps_scores_nothing():
    run = dataclasses.replace(
        config(),
        rollout=stages.RolloutConfig(rollout_batch_size=2 * STEP),
        training=stages.TrainingConfig(global_batch_size=STEP, loss_type="sft_loss"),
        opd=stages.OPDConfig(),
    )
    assert run.steps_per_rollout > 1 and not run.scores_old_policy
    assert columns_for_assembly(run, objective_options(run, 0.0)) == frozenset()


def test_an_estimator_whose_columns_no_pass_scores_is_refused(monkeypatch):
    monkeypatch.setitem(ESTIMATORS, "grpo", Estimator(lambda responses, options: None, frozenset({"ref_log_probs"})))
    batch, run = RolloutBatch.from_samples(samples()), config()
    with pytest.raises(ConfigError, match="--advantage-estimator grpo needs ref_log_probs"):
        room.with_base_advantages(batch, run, objective_options(run, 0.0))


class Trainers:
    """Records what it gets; gives `scores`."""

    def __init__(self, scores: dict[str, np.ndarray]) -> None:
        self.scores = scores

    def score(self, batches, progress, names):
        self.names = names
        return [{name: self.scores[name] for name in names & self.scores.keys()}]

    def step(self, columns, progress):
        (self.columns,) = columns
        return {}


def test_the_ranks_get_what_was_made_and_the_log_base_advantages():
    run = config(divergence={"opd_divergence": None})
    batch_samples = samples()
    batch_samples[0].set("correct", np.full(LENGTHS[0], 0.5))  # a column of the user's own, which assembly overwrites
    for sample in batch_samples[1:]:
        sample.set("correct", np.zeros(sample.response_length))
    trainers = Trainers({"log_probs": STUDENT, "teacher_log_probs": TEACHER})
    batch, metrics = train_rollout(trainers, batch_samples, run, 0.0)
    assert trainers.names == {"log_probs", "penalty_log_probs", "teacher_log_probs"}
    assert not {"log_probs", "teacher_log_probs", "loss_mask", "reward"} & trainers.columns.keys()
    assert set(np.unique(trainers.columns["correct"])) == {0.0, 1.0}
    base = assemble(samples(), run).columns["advantages"]
    np.testing.assert_array_equal(batch.columns["advantages"], base)
    assert "teacher_log_probs" not in batch.columns and "opd/penalty_weight_min" in metrics
    assert not np.array_equal(np.sort(trainers.columns["advantages"]), np.sort(base))
    alone, metrics = train_rollout(None, samples(), run, 0.0)
    np.testing.assert_array_equal(alone.columns["advantages"], base)
    assert metrics == {}


@given(st.integers(1, 4), st.integers(0, 2**31))
def test_columns_go_to_the_ranks_and_come_back(ranks, seed):
    random = np.random.default_rng(seed)
    lengths = random.integers(0, 6, 12)
    order = random.permutation(12)
    shares = Shares(tuple(np.array_split(order, ranks)), ((),) * ranks, lengths)
    columns = {
        "log_probs": random.normal(size=int(lengths.sum())),
        "candidate_ids": random.integers(0, 9, (int(lengths.sum()), 3)),
        "reward": random.normal(size=12),
    }
    joined = shares.join(shares.split(columns))
    assert set(joined) == set(columns)
    for name, values in columns.items():
        np.testing.assert_array_equal(joined[name], values)
    sample = int(order[0])
    first = shares.split(columns)[0]["log_probs"][: lengths[sample]]
    np.testing.assert_array_equal(first, columns["log_probs"][lengths[:sample].sum() :][: lengths[sample]])
