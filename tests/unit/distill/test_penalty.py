"""The OPD penalty: direction, detachment, masking, missing scores, and what its gradient is on average."""

from __future__ import annotations

import torch

from slime_opd.algorithm.advantages import base_advantages
from slime_opd.algorithm.policy_loss import clipped_policy_loss
from slime_opd.distill.penalty import apply_penalty, sampled_reverse_kl


def test_a_token_the_teacher_likes_less_loses_advantage():
    # d = log 0.5 − log 0.25 = ln 2; A = 1 − 2 ln 2.
    student, teacher = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    got = apply_penalty(torch.ones(1), student, teacher, torch.ones(1), coefficient=2.0)
    torch.testing.assert_close(got, torch.tensor([1 - 2 * 0.6931472]))


def test_the_penalty_carries_no_gradient():
    student = torch.randn(4, requires_grad=True)
    teacher = torch.randn(4, requires_grad=True)
    assert not apply_penalty(torch.zeros(4), student, teacher, torch.ones(4), coefficient=1.0).requires_grad
    assert not sampled_reverse_kl(student, teacher).requires_grad


def test_a_masked_token_keeps_its_advantage():
    got = apply_penalty(
        torch.tensor([3.0, 3.0]), torch.zeros(2), -torch.ones(2), torch.tensor([0.0, 1.0]), coefficient=1.0
    )
    assert got.tolist() == [3.0, 2.0]


def test_a_missing_score_leaves_the_advantage_bit_for_bit():
    advantages = torch.randn(3)
    teacher = torch.tensor([-1.0, float("nan"), float("nan")])
    got = apply_penalty(advantages, torch.full((3,), -2.0), teacher, torch.ones(3), coefficient=0.7)
    assert torch.equal(got[1:], advantages[1:]) and not got.isnan().any()


def test_its_expected_policy_gradient_is_that_of_the_reverse_kl():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.log_softmax(torch.randn(7, generator=generator, dtype=torch.float64), dim=0)
    student = torch.log_softmax(logits, dim=0)
    (exact,) = torch.autograd.grad((student.exp() * (student - teacher)).sum(), logits, retain_graph=True)
    # Every action once, weighted by its probability, is the expectation over sampled tokens.
    advantages = apply_penalty(torch.zeros(7, dtype=torch.float64), student, teacher, torch.ones(7), coefficient=1.0)
    loss = clipped_policy_loss(student, student.detach(), advantages, clip_low=0.2, clip_high=0.2).loss
    (expected,) = torch.autograd.grad((student.exp().detach() * loss).sum(), logits)
    torch.testing.assert_close(expected, exact, rtol=0, atol=1e-12)


def test_with_only_the_penalty_whitening_does_not_cancel_the_coefficient():
    lengths, mask = torch.tensor([2, 2]), torch.ones(4)
    base = base_advantages(
        torch.tensor([1.0, 0.0]),
        torch.tensor([0, 0]),
        lengths,
        mask,
        estimator="grpo",
        normalize_rewards=True,
        divide_by_std=True,
        whiten_advantages=True,
        only_penalty=True,
    )
    student, teacher = torch.tensor([-1.0, -2.0, -0.5, -3.0]), torch.full((4,), -1.5)
    one = apply_penalty(base, student, teacher, mask, coefficient=1.0)
    three = apply_penalty(base, student, teacher, mask, coefficient=3.0)
    assert one.tolist() == [-0.5, 0.5, -1.0, 1.5]
    torch.testing.assert_close(three, 3 * one)
