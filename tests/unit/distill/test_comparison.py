"""Which divergence of the two distributions at hand is trained, and where none is."""

from __future__ import annotations

import pytest
import torch

from slime_opd.distill.comparison import Candidates as CandidateSet
from slime_opd.distill.comparison import Comparison, DivergenceOptions, over_candidates, token_divergence
from slime_opd.distill.divergences import divergence


def candidates(valid=(True, True, False)) -> CandidateSet:
    log_p = torch.tensor([[0.5, 0.2, 0.1], [0.3, 0.3, 0.1]], dtype=torch.float64).log().requires_grad_()
    log_q = torch.tensor([[0.4, 0.4, 0.1], [0.1, 0.6, 0.2]], dtype=torch.float64).log()
    kept = torch.tensor([valid, valid])
    rest = [(1 - (one.exp() * kept).sum(1)).log() for one in (log_p, log_q)]
    return CandidateSet(log_p, log_q, kept, rest[0], rest[1], log_p.detach())


def test_the_whole_vocabularys_divergence_is_taken_as_it_is_where_the_teacher_scored():
    full = torch.tensor([1.0, 2.0], requires_grad=True)
    of_tokens = token_divergence(
        Comparison(torch.tensor([1.0, 0.0]), full, full, full=full), DivergenceOptions("jsd", 1.0)
    )
    assert of_tokens.tolist() == [1.0, 0.0]
    assert torch.autograd.grad(of_tokens.sum(), full)[0].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_over_candidates_it_is_of_the_valid_ones_and_their_tail(kind):
    comparison = over_candidates(candidates(), torch.ones(2, dtype=torch.float64))
    found = token_divergence(comparison, DivergenceOptions(kind, 1.0, beta=0.3))
    p = torch.tensor([[0.5, 0.2, 0.3], [0.3, 0.3, 0.4]], dtype=torch.float64).log()
    q = torch.tensor([[0.4, 0.4, 0.2], [0.1, 0.6, 0.3]], dtype=torch.float64).log()
    torch.testing.assert_close(found, divergence(p, q, kind=kind, beta=0.3), rtol=0, atol=1e-12)
    torch.testing.assert_close(comparison.reverse_kl, divergence(p, q, kind="reverse_kl"), rtol=0, atol=1e-12)
    torch.testing.assert_close(comparison.forward_kl, divergence(p, q, kind="forward_kl"), rtol=0, atol=1e-12)
    assert not comparison.reverse_kl.requires_grad


@pytest.mark.parametrize("kind", ["reverse_kl", "token_reward_direct"])
def test_a_token_without_scores_has_no_loss_and_no_gradient(kind):
    given = candidates()
    comparison = over_candidates(given, torch.tensor([0.0, 1.0], dtype=torch.float64))
    found = token_divergence(comparison, DivergenceOptions(kind, 1.0))
    assert found[0] == 0 and found[1] != 0
    gradient = torch.autograd.grad(found.sum(), given.log_p)[0]
    assert gradient[0].abs().max() == 0 and gradient[1].abs().max() > 0
