"""The OPD penalty: direction, detachment, masking, missing scores, clamp, discount, and what its gradient is on
average.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slime_opd.algorithm.advantages import base_advantages
from slime_opd.algorithm.estimators.estimator import EstimatorOptions, Responses
from slime_opd.algorithm.kl import kl_estimate
from slime_opd.algorithm.policy_loss import clipped_policy_loss
from slime_opd.distill.divergences import divergence
from slime_opd.distill.penalty import clamp_signal, discounted_return_to_go, sampled_reverse_kl, subtract_penalty

NAN = float("nan")


def test_a_token_the_teacher_likes_less_loses_advantage():
    # d = log 0.5 − log 0.25 = ln 2; A = 1 − 2 ln 2.
    signal = sampled_reverse_kl(torch.tensor([0.5]).log(), torch.tensor([0.25]).log())
    got = subtract_penalty(torch.ones(1), signal, torch.ones(1), coefficient=2.0)
    torch.testing.assert_close(got, torch.tensor([1 - 2 * 0.6931472]))


def test_the_penalty_carries_no_gradient():
    student, teacher = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    assert not sampled_reverse_kl(student, teacher).requires_grad
    assert not subtract_penalty(torch.zeros(4), student - teacher, torch.ones(4), coefficient=1.0).requires_grad


def test_a_masked_token_keeps_its_advantage():
    got = subtract_penalty(torch.tensor([3.0, 3.0]), torch.ones(2), torch.tensor([0.0, 1.0]), coefficient=1.0)
    assert got.tolist() == [3.0, 2.0]


def test_a_missing_score_leaves_the_advantage_bit_for_bit():
    advantages = torch.randn(3)
    signal = sampled_reverse_kl(torch.full((3,), -2.0), torch.tensor([-1.0, NAN, NAN]))
    for weights in (None, torch.full((3,), 2.0)):
        got = subtract_penalty(advantages, signal, torch.ones(3), coefficient=0.7, weights=weights)
        assert torch.equal(got[1:], advantages[1:]) and not got.isnan().any() and got[0] != advantages[0]


def test_a_weight_is_a_factor_of_the_token_s_penalty():
    signal, weights = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([2.0, 0.5, 0.0])
    got = subtract_penalty(torch.ones(3), signal, torch.ones(3), coefficient=0.5, weights=weights)
    assert got.tolist() == [0.0, 1.5, 1.0]


def test_a_clamped_signal_keeps_its_sign_and_is_counted():
    signal, clamped = clamp_signal(torch.tensor([-7.0, -2.0, 0.5, 2.0, 2.5, NAN]), 2.0)
    assert signal[:5].tolist() == [-2.0, -2.0, 0.5, 2.0, 2.0] and signal[5].isnan()
    # What is at the limit was not changed, and a missing score is in no share.
    assert clamped[:5].tolist() == [1.0, 0.0, 0.0, 0.0, 1.0] and clamped[5].isnan()


def test_without_a_limit_nothing_is_clamped():
    signal = torch.tensor([-1e6, 3.0])
    got, clamped = clamp_signal(signal, None)
    assert torch.equal(got, signal) and clamped.tolist() == [0.0, 0.0]


def test_discounted_sums_by_hand():
    # 1 + 0.5 (2 + 0.5 · 4) = 3; the next sample starts anew.
    signal, lengths = torch.tensor([1.0, 2.0, 4.0, 8.0, 6.0]), torch.tensor([3, 0, 2])
    assert discounted_return_to_go(signal, lengths, 0.5).tolist() == [3.0, 4.0, 4.0, 11.0, 6.0]
    assert discounted_return_to_go(signal, lengths, 0.0).tolist() == signal.tolist()
    assert discounted_return_to_go(signal, lengths, 1.0).tolist() == [7.0, 6.0, 4.0, 14.0, 6.0]


def test_a_missing_score_adds_nothing_to_the_tokens_before_it():
    got = discounted_return_to_go(torch.tensor([1.0, NAN, 4.0]), torch.tensor([3]), 0.5)
    assert got[[0, 2]].tolist() == [2.0, 4.0] and got[1].isnan()


def test_nothing_has_no_sums():
    assert discounted_return_to_go(torch.zeros(0), torch.zeros(0, dtype=torch.int64), 0.9).shape == (0,)
    assert discounted_return_to_go(torch.zeros(0), torch.zeros(2, dtype=torch.int64), 0.9).shape == (0,)


@given(
    samples=st.lists(st.lists(st.one_of(st.integers(-8, 8), st.just(NAN)), max_size=40), max_size=6),
    discount=st.one_of(st.sampled_from([0.0, 0.5, 0.99, 1.0]), st.floats(0, 1)),
)
def test_discounted_sums_are_the_loop_from_the_end(samples, discount):
    expected = []
    for sample in samples:
        after, sums = 0.0, []
        for value in reversed(sample):
            after = (0.0 if math.isnan(value) else value) + discount * after
            sums.append(NAN if math.isnan(value) else after)
        expected += reversed(sums)
    signal = torch.tensor([float(value) for sample in samples for value in sample], dtype=torch.float64)
    got = discounted_return_to_go(
        signal, torch.tensor([len(sample) for sample in samples], dtype=torch.int64), discount
    )
    # Sums of whole numbers round nowhere.
    exact = discount in (0.0, 1.0)
    torch.testing.assert_close(
        got,
        torch.tensor(expected, dtype=torch.float64),
        rtol=0 if exact else 1e-9,
        atol=0 if exact else 1e-9,
        equal_nan=True,
    )


def student_and_teacher(vocabulary: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a student, a leaf, and log-probs of its teacher; float64 [V]."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(vocabulary, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(vocabulary, generator=generator, dtype=torch.float64).log_softmax(dim=0)
    return logits, teacher


def expected_gradient(loss_of_tokens: torch.Tensor, student: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Every token once, weighted by its probability: the mean gradient over sampled tokens, without sampling."""
    return torch.autograd.grad((student.exp().detach() * loss_of_tokens).sum(), logits, retain_graph=True)[0]


def exact_gradient(kind: str, student: torch.Tensor, teacher: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(divergence(student, teacher, kind=kind), logits, retain_graph=True)[0]


def test_its_expected_policy_gradient_is_that_of_the_reverse_kl():
    logits, teacher = student_and_teacher()
    student = logits.log_softmax(dim=0)
    signal = sampled_reverse_kl(student, teacher)
    advantages = subtract_penalty(torch.zeros(7).double(), signal, torch.ones(7), coefficient=1.0)
    loss = clipped_policy_loss(student, student.detach(), advantages, clip_low=0.2, clip_high=0.2).loss
    exact = exact_gradient("reverse_kl", student, teacher, logits)
    torch.testing.assert_close(expected_gradient(loss, student, logits), exact, rtol=0, atol=1e-12)


def test_an_advantage_that_is_the_same_for_every_token_trains_nothing():
    logits, teacher = student_and_teacher()
    student = logits.log_softmax(dim=0)
    # The whole KL of the position, say: it does not depend on which token was sampled.
    whole = -divergence(student, teacher, kind="reverse_kl").detach().expand(7)
    loss = clipped_policy_loss(student, student.detach(), whole, clip_low=0.2, clip_high=0.2).loss
    assert expected_gradient(loss, student, logits).abs().max() < 1e-15
    assert whole[0] < -0.1


def sampled_gradients(count: int, advantage_of) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each sampled token's policy gradient [count, V], with advantage_of(log p, log q, tokens), and student and
    teacher.
    """
    logits, teacher = student_and_teacher()
    student = logits.detach().log_softmax(dim=0)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.multinomial(student.exp(), count, replacement=True, generator=generator)
    own = logits.detach().expand(count, -1).clone().requires_grad_()
    log_probs = own.log_softmax(dim=1).gather(1, tokens[:, None])[:, 0]
    advantages = advantage_of(student, teacher, tokens)
    loss = clipped_policy_loss(log_probs, log_probs.detach(), advantages, clip_low=0.2, clip_high=0.2).loss
    return torch.autograd.grad(loss.sum(), own)[0], student, teacher


def assert_mean_is(gradients: torch.Tensor, expected: torch.Tensor) -> None:
    """Every coordinate within 5 standard errors, and Hotelling's statistic likely for its 6 degrees of freedom."""
    count, error = len(gradients), gradients.mean(dim=0) - expected
    standard_errors = gradients.std(dim=0) / math.sqrt(count)
    assert (error.abs() < 5 * standard_errors).all()
    # Gradients of logits add up to 0, so the last coordinate is known from the others.
    covariance = torch.cov(gradients[:, :-1].T) / count
    statistic = error[:-1] @ torch.linalg.solve(covariance, error[:-1])
    assert 0.1 < statistic < 27.9  # chi-square, 6 degrees: all but 1e-4 lies below 27.9, all but 2e-5 above 0.1


def test_over_sampled_tokens_the_penalty_s_gradient_is_the_reverse_kl_s_within_its_error():
    count = 300_000

    def penalty(student, teacher, tokens):
        signal = sampled_reverse_kl(student[tokens], teacher[tokens])
        return subtract_penalty(torch.zeros(count).double(), signal, torch.ones(count), coefficient=1.0)

    gradients, student, teacher = sampled_gradients(count, penalty)
    logits, _ = student_and_teacher()
    exact = exact_gradient("reverse_kl", logits.log_softmax(dim=0), teacher, logits)
    assert_mean_is(gradients, exact)
    # The test can tell: the forward KL's gradient is many errors away.
    of_forward = student.exp() - teacher.exp()
    assert ((gradients.mean(dim=0) - of_forward).abs() * math.sqrt(count) / gradients.std(dim=0)).max() > 50


def test_over_sampled_tokens_the_whole_kl_as_an_advantage_trains_nothing():
    def whole(student, teacher, tokens):
        return -divergence(student, teacher, kind="reverse_kl").expand(len(tokens))

    gradients, _, _ = sampled_gradients(300_000, whole)
    assert_mean_is(gradients, torch.zeros(7, dtype=torch.float64))


def test_what_the_kl_estimators_train_when_they_are_differentiated():
    logits, teacher = student_and_teacher()
    student = logits.log_softmax(dim=0)
    got = {
        kind: expected_gradient(kl_estimate(student, teacher, kind=kind), student, logits)
        for kind in ("k1", "k2", "k3")
    }
    reverse, forward = (exact_gradient(kind, student, teacher, logits) for kind in ("reverse_kl", "forward_kl"))
    assert got["k1"].abs().max() < 1e-15
    torch.testing.assert_close(got["k2"], reverse, rtol=0, atol=1e-12)
    torch.testing.assert_close(got["k3"], forward, rtol=0, atol=1e-12)
    assert (reverse - forward).abs().max() > 0.05


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_as_values_the_kl_estimators_are_the_reverse_kl(kind):
    logits, teacher = student_and_teacher()
    student = logits.detach().log_softmax(dim=0)
    mean = (student.exp() * kl_estimate(student, teacher, kind=kind)).sum()
    torch.testing.assert_close(mean, divergence(student, teacher, kind="reverse_kl"), rtol=0, atol=1e-12)


def test_with_only_the_penalty_whitening_does_not_cancel_the_coefficient():
    lengths, mask = torch.tensor([2, 2]), torch.ones(4)
    base = base_advantages(
        Responses(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), lengths, mask, {}),
        EstimatorOptions(),
        estimator="grpo",
        whiten_advantages=True,
        only_penalty=True,
    )
    signal = sampled_reverse_kl(torch.tensor([-1.0, -2.0, -0.5, -3.0]), torch.full((4,), -1.5))
    one = subtract_penalty(base, signal, mask, coefficient=1.0)
    three = subtract_penalty(base, signal, mask, coefficient=3.0)
    assert one.tolist() == [-0.5, 0.5, -1.0, 1.5]
    torch.testing.assert_close(three, 3 * one)
