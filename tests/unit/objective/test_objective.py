"""The policy objective and its parts: PPO's clip, KL estimators, denominators, and how they add up."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slime_opd import fields
from slime_opd.algorithm.kl import kl_estimate
from slime_opd.algorithm.policy_loss import clipped_policy_loss
from slime_opd.algorithm.reduction import token_weights
from slime_opd.distill.penalty import PenaltyOptions
from slime_opd.objective.evaluate import evaluate
from slime_opd.objective.options import Options, PolicyOptions, SupervisedOptions
from slime_opd.objective.streams import Objective
from slime_opd.objective.tokens import Terms, TokenColumns

OPTIONS = PolicyOptions(
    clip_low=0.2,
    clip_high=0.28,
    dual_clip=None,
    entropy_coefficient=0.01,
    kl_coefficient=0.3,
    kl_kind="k2",
    use_rollout_log_probs=False,
    penalty=PenaltyOptions(0.5),
)
LENGTHS = torch.tensor([3, 0, 5, 2])


def evaluated(columns: dict[str, torch.Tensor], terms: Terms, options: Options) -> Objective:
    return evaluate(TokenColumns.from_mapping(columns), terms, options)


def problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    total = int(LENGTHS.sum())
    draw = lambda: torch.randn(total, generator=generator, dtype=dtype)  # noqa: E731
    mask = torch.ones(total, dtype=dtype)
    mask[4] = 0
    columns = {
        "advantages": draw(),
        "teacher_log_probs": draw(),
        "ref_log_probs": draw(),
        "rollout_log_probs": draw(),
        "loss_mask": mask,
        "policy_weights": token_weights(mask, LENGTHS, per_token=False).to(dtype),
    }
    columns["teacher_log_probs"][6] = float("nan")
    return columns, draw().requires_grad_(), draw().requires_grad_()


@pytest.mark.parametrize(("ratio", "advantage", "loss", "clipped"), [
    (1.5, 1.0, -1.28, 1.0),  # gain cut at 1 + 0.28
    (0.5, 1.0, -0.5, 0.0),
    (0.5, -1.0, 0.8, 1.0),  # loss held at 1 − 0.2
    (1.5, -1.0, 1.5, 0.0),
])  # fmt: skip
def test_ppo_clip_by_hand(ratio, advantage, loss, clipped):
    got = clipped_policy_loss(
        torch.tensor([ratio]).log(), torch.zeros(1), torch.tensor([advantage]), clip_low=0.2, clip_high=0.28
    )
    assert got.loss.item() == pytest.approx(loss, abs=1e-6) and got.clipped.item() == clipped


def test_dual_clip_bounds_the_loss_of_a_bad_token():
    got = clipped_policy_loss(
        torch.tensor([10.0]).log(), torch.zeros(1), -torch.ones(1), clip_low=0.2, clip_high=0.2, dual_clip=3.0
    )
    assert got.loss.item() == pytest.approx(3.0)


def test_kl_estimators_by_hand():
    policy, reference = torch.tensor([-1.0]), torch.tensor([-1.5])  # d = 0.5
    expected = {"k1": 0.5, "k2": 0.125, "k3": np.exp(-0.5) - 0.5, "low_var_kl": np.exp(-0.5) - 0.5}
    for kind, value in expected.items():
        assert kl_estimate(policy, reference, kind=kind).item() == pytest.approx(value, abs=1e-6)
    assert kl_estimate(torch.tensor([-20.0]), torch.tensor([0.0]), kind="low_var_kl").item() == 10.0


def test_token_weights_by_hand():
    mask = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0])
    lengths = torch.tensor([3, 1, 1])  # the last sample is masked whole: in no denominator
    np.testing.assert_allclose(token_weights(mask, lengths, per_token=False), [0.25, 0.25, 0, 0.5, 0])
    np.testing.assert_allclose(token_weights(mask, lengths, per_token=True), np.array([1, 1, 0, 1, 0]) / 3, rtol=1e-6)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=8), st.booleans(), st.integers(0, 2**31))
def test_weights_of_a_step_sum_to_one_unless_nothing_trains(lengths, per_token, seed):
    mask = torch.from_numpy(np.random.default_rng(seed).integers(0, 2, sum(lengths)).astype(np.float32))
    total = float(token_weights(mask, torch.tensor(lengths), per_token=per_token).sum())
    assert total == pytest.approx(1.0 if mask.any() else 0.0, abs=1e-5)


def test_the_objective_is_the_formula():
    columns, log_probs, entropies = problem()
    got = evaluated(columns, Terms(log_probs, entropies), OPTIONS)
    expected = 0.0
    for t in range(len(log_probs)):
        d = (log_probs[t] - columns["teacher_log_probs"][t]).item()
        counted = columns["loss_mask"][t] > 0 and not np.isnan(d)
        advantage = columns["advantages"][t].item() - (0.5 * d if counted else 0.0)
        kl = (log_probs[t] - columns["ref_log_probs"][t]).item() ** 2 / 2
        # On policy the ratio is 1.
        expected += columns["policy_weights"][t].item() * (-advantage - 0.01 * entropies[t].item() + 0.3 * kl)
    assert got.loss.item() == pytest.approx(expected, abs=1e-9)
    d = (log_probs - columns["teacher_log_probs"]).detach()
    counted = (columns["loss_mask"] > 0) & ~d.isnan()
    total, count = got.means["opd/reverse_kl"]
    assert count == counted.sum() == 8
    assert total.item() == pytest.approx(d[counted].sum().item())


def test_the_only_step_of_a_rollout_needs_no_pass_for_old_log_probs():
    columns, log_probs, entropies = problem()
    alone = evaluated(columns, Terms(log_probs, entropies), OPTIONS)
    scored = evaluated({**columns, "log_probs": log_probs.detach()}, Terms(log_probs, entropies), OPTIONS)
    assert alone.loss.item() == scored.loss.item()
    gradients = [torch.autograd.grad(o.loss, (log_probs, entropies), retain_graph=True) for o in (alone, scored)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_micro_batches_add_up_to_the_step():
    columns, log_probs, entropies = problem()
    whole = evaluated(columns, Terms(log_probs, entropies), OPTIONS)
    parts = [
        evaluated({k: v[rows] for k, v in columns.items()}, Terms(log_probs[rows], entropies[rows]), OPTIONS)
        for rows in (slice(0, 3), slice(3, 4), slice(4, 10))
    ]
    joined = Objective.of_chunks(parts)
    assert joined.loss.item() == pytest.approx(whole.loss.item(), abs=1e-12)
    for name, value in whole.totals.items():
        assert joined.totals[name].item() == pytest.approx(value.item(), abs=1e-12)
    for name, (total, count) in whole.means.items():
        assert joined.means[name][1].item() == count.item()
        assert joined.means[name][0].item() == pytest.approx(total.item(), abs=1e-12)
    for name, bins in whole.histograms.items():
        torch.testing.assert_close(joined.histograms[name], bins, rtol=0, atol=1e-12)


def test_a_teacher_that_is_the_student_gives_no_gradient():
    columns, log_probs, entropies = problem()
    columns |= {"advantages": torch.zeros_like(log_probs), "teacher_log_probs": log_probs.detach().clone()}
    quiet = PolicyOptions(0.2, 0.2, None, 0.0, None, "k1", False, PenaltyOptions(1.0))
    got = evaluated(columns, Terms(log_probs, entropies), quiet)
    (gradient,) = torch.autograd.grad(got.loss, log_probs)
    assert got.means["opd/reverse_kl"][0] == 0 and gradient.abs().max() == 0


def test_the_penalty_is_taken_at_the_teachers_temperature_where_it_differs():
    columns, log_probs, entropies = problem()
    other = log_probs.detach() + 0.25
    got = evaluated(columns, Terms(log_probs, entropies, other), OPTIONS).means["opd/reverse_kl"]
    same = evaluated(columns, Terms(log_probs, entropies), OPTIONS).means["opd/reverse_kl"]
    assert (got[0] - same[0]).item() == pytest.approx(0.25 * 8)


def test_supervised_loss_is_the_weighted_negative_log_likelihood():
    columns, log_probs, entropies = problem()
    got = evaluated(columns, Terms(log_probs, entropies), SupervisedOptions())
    assert got.loss.item() == pytest.approx(-(columns["policy_weights"] * log_probs).sum().item())


def test_weights_of_the_penalty_scale_each_tokens_penalty():
    columns, log_probs, entropies = problem()
    weights = torch.arange(len(log_probs)).double()
    plain = evaluated(columns, Terms(log_probs, entropies), OPTIONS).means["train/advantages"][0]
    weighed = {**columns, "penalty_weights": weights}
    got = evaluated(weighed, Terms(log_probs, entropies), OPTIONS).means["train/advantages"][0]
    signal = (log_probs - columns["teacher_log_probs"]).detach().nan_to_num(0.0) * (columns["policy_weights"] > 0)
    assert (plain - got).item() == pytest.approx(0.5 * ((weights - 1) * signal).sum().item())


def test_a_clamp_holds_the_signal_and_says_how_often():
    columns, log_probs, entropies = problem()
    options = replace(OPTIONS, penalty=PenaltyOptions(0.5, clamp=0.4))
    got = evaluated(columns, Terms(log_probs, entropies), options)
    signal = (log_probs - columns["teacher_log_probs"]).detach()
    counted = (columns["policy_weights"] > 0) & ~signal.isnan()
    held = signal[counted].clamp(-0.4, 0.4)
    advantages = columns["advantages"][columns["policy_weights"] > 0].sum() - 0.5 * held.sum()
    assert got.means["train/advantages"][0].item() == pytest.approx(advantages.item())
    assert [part.item() for part in got.means["opd/clamp_fraction"]] == [(held.abs() == 0.4).sum(), 8]
    # The metric is of the signal as it is.
    assert got.means["opd/reverse_kl"][0].item() == pytest.approx(signal[counted].sum().item())


def test_the_refreshed_student_is_the_policy_now_and_the_other_that_of_the_first_step():
    columns, log_probs, entropies = problem()
    columns["log_probs"] = log_probs.detach() - 0.125
    means = {
        refresh: evaluated(
            columns, Terms(log_probs, entropies), replace(OPTIONS, penalty=PenaltyOptions(0.5, refresh_student=refresh))
        ).means["opd/reverse_kl"][0]
        for refresh in (True, False)
    }
    assert (means[True] - means[False]).item() == pytest.approx(0.125 * 8)


def test_masked_tokens_may_hold_nan_and_change_nothing():
    columns, log_probs, entropies = problem()
    clean = evaluated(columns, Terms(log_probs, entropies), OPTIONS)
    expected = torch.autograd.grad(clean.loss, (log_probs, entropies), retain_graph=True)
    for name in ("teacher_log_probs", "ref_log_probs", "rollout_log_probs"):
        columns[name][4] = float("nan")
    dirty = evaluated(columns, Terms(log_probs, entropies), replace(OPTIONS, use_rollout_log_probs=False))
    assert dirty.loss.item() == clean.loss.item()
    for got, wanted in zip(torch.autograd.grad(dirty.loss, (log_probs, entropies)), expected, strict=True):
        assert torch.equal(got, wanted)
    assert all(torch.isfinite(torch.stack(pair)).all() for pair in dirty.means.values())


def test_the_ratios_denominator_may_be_the_engines_and_the_penaltys_student_never_is():
    columns, log_probs, entropies = problem()
    columns["rollout_log_probs"] = log_probs.detach() - 0.5
    engines = evaluated(columns, Terms(log_probs, entropies), replace(OPTIONS, use_rollout_log_probs=True))
    trainers = evaluated(columns, Terms(log_probs, entropies), OPTIONS)
    assert engines.means["opd/reverse_kl"] == trainers.means["opd/reverse_kl"]
    assert engines.means["train/advantages"] == trainers.means["train/advantages"]
    assert engines.means["train/ppo_kl"][0].item() == pytest.approx(-0.5 * 9)


def test_token_columns_are_rows_of_the_field_table_and_other_columns_are_left_out():
    table = {row.name for row in fields.TABLE if row.level == fields.RESPONSE}
    names = {field.name for field in dataclasses.fields(TokenColumns)}
    assert names <= table
    ones = torch.ones(1)
    assert TokenColumns.from_mapping(dict.fromkeys(table, ones)).loss_mask is ones


def test_an_engines_log_probs_may_be_missing_where_every_response_is_another_models():
    columns, log_probs, entropies = problem()
    del columns["rollout_log_probs"]
    columns["policy_weights"] = torch.zeros_like(columns["policy_weights"])
    got = evaluated(columns, Terms(log_probs, entropies), replace(OPTIONS, use_rollout_log_probs=True))
    assert got.totals["train/policy_loss"] == 0
