"""thunlp/OPD's reward on candidates: values against loops, clipping off policy, and whose gradient it is."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from slime_opd.distill.candidates import STRATEGIES, candidates
from slime_opd.distill.token_reward import NORMALIZED, WEIGHT_MODES, token_reward_direct

CLIPS = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}
INF = float("inf")


def models(rows: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The policy now, the policy that starts the rollout's steps, and the teacher; float64 log-probs [rows,
    vocabulary].
    """
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
    now = old + 0.5 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
    teacher = old + torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
    return now.log_softmax(dim=1), old.log_softmax(dim=1), teacher.log_softmax(dim=1)


def by_hand(now, old, teacher, weight_mode, normalize, clip_low, clip_high, dual_clip):
    """Loss and rewards of the candidates of one token, one by one, from their log-probs."""
    weights = [
        {"student_p": math.exp(o), "teacher_p": math.exp(q), "none": 1.0}[weight_mode]
        for o, q in zip(old, teacher, strict=True)
    ]
    if normalize:
        weights = [weight / sum(weights) for weight in weights]
    rewards = [-(o - q) * weight for o, q, weight in zip(old, teacher, weights, strict=True)]
    loss = 0.0
    for log_p, o, reward in zip(now, old, rewards, strict=True):
        ratio = math.exp(log_p - o)
        one = max(-ratio * reward, -min(max(ratio, 1 - clip_low), 1 + clip_high) * reward)
        if dual_clip is not None and reward < 0:
            one = min(one, -dual_clip * reward)
        loss += one
    return loss, rewards


@pytest.mark.parametrize("dual_clip", [None, 1.2])
@pytest.mark.parametrize("weight_mode", WEIGHT_MODES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_is_the_loop_over_candidates(strategy, weight_mode, dual_clip):
    now, old, teacher = models(30, 17)
    ids, valid = candidates(old.topk(5).indices, teacher.topk(5).indices, strategy)
    clips = CLIPS | {"dual_clip": dual_clip}
    normalize = NORMALIZED[strategy]
    loss, reward = token_reward_direct(
        *(log.gather(1, ids) for log in (now, old, teacher)),
        valid,
        weight_mode=weight_mode,
        normalize=normalize,
        **clips,
    )
    assert loss.shape == (30,) and reward.shape == ids.shape
    for row in range(30):
        of_row = [log[row, ids[row, valid[row]]].tolist() for log in (now, old, teacher)]
        expected, rewards = by_hand(*of_row, weight_mode, normalize, **clips)
        assert loss[row].item() == pytest.approx(expected, abs=1e-9)
        assert reward[row, valid[row]].tolist() == pytest.approx(rewards, abs=1e-9)
        assert (reward[row, ~valid[row]] == 0).all()


def test_two_candidates_by_hand():
    # p = (0.6, 0.2), q = (0.3, 0.4): log-ratios ln 2 and −ln 2.
    log_p, log_q = torch.tensor([[0.6, 0.2]]).log(), torch.tensor([[0.3, 0.4]]).log()
    valid = torch.ones(1, 2, dtype=torch.bool)
    expected = {
        ("student_p", True): (0.75, 0.25),
        ("student_p", False): (0.6, 0.2),
        ("teacher_p", True): (3 / 7, 4 / 7),
        ("teacher_p", False): (0.3, 0.4),
        ("none", True): (0.5, 0.5),
        ("none", False): (1.0, 1.0),
    }
    for (weight_mode, normalize), (first, second) in expected.items():
        loss, reward = token_reward_direct(
            log_p, log_p, log_q, valid, weight_mode=weight_mode, normalize=normalize, **CLIPS
        )
        torch.testing.assert_close(reward, math.log(2) * torch.tensor([[-first, second]]))
        torch.testing.assert_close(loss, math.log(2) * torch.tensor([first - second]))  # −Σ of the rewards at ratio 1


def test_every_strategy_but_the_symmetric_difference_scales_its_weights():
    assert {name for name, normalized in NORMALIZED.items() if not normalized} == {"union-intersection"}
    assert set(NORMALIZED) == set(STRATEGIES)


def test_over_the_whole_vocabulary_its_gradient_is_that_of_the_reverse_kl():
    _, old, teacher = models(8, 13)
    logits = old.clone().requires_grad_()
    log_p = logits.log_softmax(dim=1)
    (exact,) = torch.autograd.grad((log_p.exp() * (log_p - teacher)).sum(), logits, retain_graph=True)
    loss, _ = token_reward_direct(
        log_p,
        log_p.detach(),
        teacher,
        torch.ones_like(log_p, dtype=torch.bool),
        weight_mode="student_p",
        normalize=True,
        **CLIPS,
    )
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), logits)[0], exact, rtol=0, atol=1e-12)


def test_over_a_set_its_gradient_is_the_truncated_kl_s_without_the_mass_s():
    _, old, teacher = models(8, 13)
    ids = old.topk(4).indices
    logits = old.clone().requires_grad_()
    log_p, log_q = logits.log_softmax(dim=1).gather(1, ids), teacher.gather(1, ids)
    loss, _ = token_reward_direct(
        log_p, log_p.detach(), log_q, torch.ones_like(ids).bool(), weight_mode="student_p", normalize=True, **CLIPS
    )
    (got,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
    mass = log_p.exp().sum(dim=1)
    truncated = (log_p.exp() * (log_p - log_q)).sum(dim=1)
    (expected,) = torch.autograd.grad(((truncated - mass) / mass.detach()).sum(), logits, retain_graph=True)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    # So it is not the gradient of the KL between the sets' own distributions.
    own = log_p.log_softmax(dim=1)
    (of_set,) = torch.autograd.grad((own.exp() * (own - log_q.log_softmax(dim=1))).sum(), logits)
    assert (got - of_set).abs().max() > 0.01


def test_off_policy_a_gain_past_the_clip_takes_no_gradient():
    # The first candidate is to grow (reward above 0) and has grown by half, the second is to shrink and has halved.
    old, ratio = torch.tensor([[0.2, 0.4]]).log(), torch.tensor([[1.5, 0.5]])
    log_q = torch.tensor([[0.4, 0.2]]).log()
    loss_of = partial(
        token_reward_direct,
        old_log_p=old,
        log_q=log_q,
        valid=torch.ones(1, 2, dtype=torch.bool),
        weight_mode="none",
        normalize=False,
        **CLIPS,
    )
    log_p = (old + ratio.log()).requires_grad_()
    loss, reward = loss_of(log_p)
    torch.testing.assert_close(reward, math.log(2) * torch.tensor([[1.0, -1.0]]))
    torch.testing.assert_close(loss, math.log(2) * torch.tensor([-1.28 + 0.8]))
    assert torch.autograd.grad(loss.sum(), log_p)[0].tolist() == [[0.0, 0.0]]
    # Moved the wrong way, both take it: −ratio · reward.
    log_p = (old + ratio.flip(1).log()).requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(log_p)[0].sum(), log_p)
    torch.testing.assert_close(gradient, math.log(2) * torch.tensor([[-0.5, 1.5]]))
    # Beyond the dual clip a shrinking candidate takes none again.
    log_p = (old + torch.tensor([[1.0, 3.5]]).log()).requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(log_p)[0].sum(), log_p)
    torch.testing.assert_close(gradient, math.log(2) * torch.tensor([[-1.0, 0.0]]))


def test_only_the_policy_now_takes_a_gradient():
    now, old, teacher = (log.requires_grad_() for log in models(3, 4))
    loss, reward = token_reward_direct(
        now, old, teacher, torch.ones(3, 4).bool(), weight_mode="student_p", normalize=True, **CLIPS
    )
    assert not reward.requires_grad
    loss.sum().backward()
    assert now.grad.abs().sum() > 0 and old.grad is None and teacher.grad is None


def test_the_gradient_is_that_of_finite_differences():
    now, old, teacher = models(4, 6)
    ids, valid = candidates(old.topk(3).indices, teacher.topk(3).indices, "union")

    def of_log_p(log_p):
        return token_reward_direct(
            log_p,
            old.gather(1, ids),
            teacher.gather(1, ids),
            valid,
            weight_mode="teacher_p",
            normalize=True,
            **CLIPS,
        )[0]

    assert torch.autograd.gradcheck(of_log_p, (now.gather(1, ids).requires_grad_(),))


@pytest.mark.parametrize("held", [INF, -INF, float("nan")])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weight_mode", WEIGHT_MODES)
def test_what_an_invalid_candidate_holds_does_not_matter(weight_mode, normalize, held):
    now, old, teacher = models(2, 3)
    valid = torch.tensor([[True, False, True], [False, False, False]])  # the second token has no candidate at all
    loss_of = partial(token_reward_direct, valid=valid, weight_mode=weight_mode, normalize=normalize, **CLIPS)
    clean, _ = loss_of(now.requires_grad_(), old, teacher)
    spoilt = [log.detach().masked_fill(~valid, held).requires_grad_() for log in (now, old, teacher)]
    loss, reward = loss_of(*spoilt)
    assert torch.equal(loss, clean) and loss[1].item() == 0.0 and reward.isfinite().all()
    (expected,), (gradient,) = torch.autograd.grad(clean.sum(), now), torch.autograd.grad(loss.sum(), spoilt[0])
    assert torch.equal(gradient, expected) and (gradient != 0).any() and (gradient[~valid] == 0).all()
