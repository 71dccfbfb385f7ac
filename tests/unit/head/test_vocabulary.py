"""A distribution over the vocabulary, its parts and their gradients, against autograd over a plain log-softmax in
float64.
"""

from __future__ import annotations

import pytest
import torch

from slime_opd.distill.divergences import divergence
from slime_opd.head.output_layer import chunked_objective, chunks, score
from slime_opd.head.vocabulary import Distribution, TermGradients, VocabularyShard, chunk_logits, full_divergence

TOKENS, HIDDEN, VOCABULARY, PADDED = 11, 6, 13, 16
SHARD = VocabularyShard(start=0, size=VOCABULARY)


def inputs(dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=dtype)
    weight = torch.randn(PADDED, HIDDEN, generator=generator, dtype=dtype)
    return hidden, weight, torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)


def log_softmax(hidden, weight, temperature=1.0):
    return torch.log_softmax((hidden @ weight.T)[:, :VOCABULARY] / temperature, dim=-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_size", [1, 4, 1024])
def test_scores_are_log_probs_and_entropies_at_any_chunk_size(temperature, chunk_size):
    hidden, weight, targets = inputs()
    log_probs, entropies = score(hidden, weight, targets, SHARD, temperature=temperature, chunk_size=chunk_size)
    log_p = log_softmax(hidden, weight, temperature)
    torch.testing.assert_close(log_probs, log_p.gather(1, targets[:, None])[:, 0], rtol=0, atol=1e-12)
    torch.testing.assert_close(entropies, -(log_p.exp() * log_p).sum(1), rtol=0, atol=1e-12)


def test_a_hand_computed_case():
    # Logits (0, ln 3) give probabilities (1/4, 3/4).
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [torch.tensor(3.0).log()]])
    shard = VocabularyShard(start=0, size=2)
    log_probs, entropy = score(hidden, weight, torch.tensor([1]), shard, temperature=1.0, chunk_size=8)
    assert log_probs.item() == pytest.approx(-0.2876820724, abs=1e-6)
    assert entropy.item() == pytest.approx(0.25 * 1.3862943611 + 0.75 * 0.2876820724, abs=1e-6)


def test_padding_takes_no_probability_mass_and_its_ids_have_no_log_prob():
    hidden, weight, targets = inputs()
    huge = weight.clone()
    huge[VOCABULARY:] = 1e3
    plain, _ = score(hidden, weight, targets, SHARD, temperature=1.0, chunk_size=4)
    targets[3] = VOCABULARY
    padded, entropy = score(hidden, huge, targets, SHARD, temperature=1.0, chunk_size=4)
    assert padded[3].isnan() and padded.isnan().sum() == 1
    assert torch.equal(plain[targets < VOCABULARY], padded[targets < VOCABULARY])
    assert torch.isfinite(entropy).all()


def test_no_tokens_is_no_work():
    _, weight, _ = inputs()
    empty = torch.zeros(0, dtype=torch.int64)
    log_probs, entropies = score(torch.zeros(0, HIDDEN).double(), weight, empty, SHARD, temperature=1.0, chunk_size=4)
    assert log_probs.shape == entropies.shape == (0,)
    assert chunks(0, 4) == [slice(0, 0)] and chunks(9, 4) == [slice(0, 4), slice(4, 8), slice(8, 9)]


@pytest.mark.parametrize("temperature", [1.0, 1.4])
def test_everything_that_can_be_asked_has_the_gradient_of_autograd(temperature):
    hidden, weight, _ = inputs()
    logits = chunk_logits(hidden, weight, SHARD)
    ids = torch.stack([torch.randperm(VOCABULARY)[:4] for _ in range(TOKENS)])
    valid = torch.rand(TOKENS, 4) > 0.3
    upstream = [torch.randn(shape, dtype=torch.float64) for shape in ((TOKENS, 4), (TOKENS,), (TOKENS,))]
    leaf = logits.clone().requires_grad_()
    log_p = torch.log_softmax(leaf[:, :VOCABULARY] / temperature, dim=1)
    inside = torch.zeros(TOKENS, VOCABULARY).scatter_add_(1, ids, valid.float()) > 0
    asked = [
        log_p.gather(1, ids),
        -(log_p.exp() * log_p).sum(1),
        (log_p.exp() * ~inside).sum(1).log(),
    ]
    loss = sum((one * up).sum() for one, up in zip(asked, upstream, strict=True))
    (expected,) = torch.autograd.grad(loss, leaf)
    got = Distribution(logits.clone(), SHARD, temperature)
    found = [got.log_probs(ids), got.entropies(), got.log_rest(ids, valid)]
    for ours, theirs in zip(found, asked, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1e-12)
    gradient = got.logit_gradients(
        TermGradients(
            log_probs=((ids, upstream[0]),),
            entropies=(found[1], upstream[1]),
            log_rest=(ids, valid, found[2], upstream[2]),
        )
    )
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_a_divergence_over_the_vocabulary_has_the_value_and_gradient_of_autograd(kind):
    hidden, weight, _ = inputs()
    teacher_logits = chunk_logits(hidden + 0.3, weight, SHARD)
    leaf = chunk_logits(hidden, weight, SHARD).requires_grad_()
    log_p, log_q = (torch.log_softmax(one[:, :VOCABULARY], dim=1) for one in (leaf, teacher_logits))
    expected = divergence(log_p, log_q, kind=kind, beta=0.3)
    (of_logits,) = torch.autograd.grad(expected.sum(), leaf)
    student, teacher = Distribution(leaf.detach().clone(), SHARD), Distribution(teacher_logits.clone(), SHARD)
    found = full_divergence(student, teacher, kind=kind, beta=0.3)
    torch.testing.assert_close(found.values, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.slope, of_logits, rtol=0, atol=1e-12)
    for name in ("reverse_kl", "forward_kl"):
        torch.testing.assert_close(
            getattr(found, name), divergence(log_p, log_q, kind=name).detach(), rtol=0, atol=1e-12
        )


def test_distributions_that_do_not_meet_stay_finite():
    logits = torch.tensor([[200.0, -200.0, 0.0]])
    student, teacher = Distribution(logits.clone(), VocabularyShard(0, 3)), Distribution(-logits, VocabularyShard(0, 3))
    for kind in ("reverse_kl", "forward_kl", "jsd"):
        found = full_divergence(
            Distribution(logits.clone(), VocabularyShard(0, 3)), Distribution(-logits, VocabularyShard(0, 3)),
            kind=kind, beta=0.5,
        )  # fmt: skip
        assert torch.isfinite(found.values).all() and torch.isfinite(found.slope).all(), kind
        expected = {"reverse_kl": 400.0, "forward_kl": 400.0, "jsd": torch.log(torch.tensor(2.0)).item()}[kind]
        assert found.values.item() == pytest.approx(expected, rel=1e-5)
    assert torch.isfinite(student.log_p).all() and torch.isfinite(teacher.log_p).all()


class SquareOfLogits:
    """The smallest head: the sum of squared logits, so that the gradient is known."""

    def __call__(self, logits, rows):
        from slime_opd.objective.streams import Objective

        return Objective((logits**2).sum(), {}, {}), 2 * logits


@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_the_gradient_of_a_chunks_logits_reaches_hidden_states_and_weight(chunk_size):
    hidden, weight, _ = inputs()
    hidden.requires_grad_()
    weight = weight[:VOCABULARY].clone().requires_grad_()
    total = chunked_objective(hidden, weight, SHARD, SquareOfLogits(), chunk_size)
    expected = (hidden @ weight.T).square().sum()
    torch.testing.assert_close(total.loss, expected, rtol=1e-12, atol=0)
    # Scaled, as a loss scale would.
    got = torch.autograd.grad(3 * total.loss, (hidden, weight))
    for ours, theirs in zip(got, torch.autograd.grad(3 * expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
