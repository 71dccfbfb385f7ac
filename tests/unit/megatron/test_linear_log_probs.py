"""Chunked, fused log-probs against a plain float64 log-softmax."""

from __future__ import annotations

import pytest
import torch

from slime_opd.megatron.linear_log_probs import VocabularyShard, linear_log_probs

TOKENS, HIDDEN, VOCABULARY, PADDED = 11, 6, 13, 16


def inputs(dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(PADDED, HIDDEN, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    return hidden, weight, targets


def brute_force(hidden, weight, targets, temperature):
    log_p = torch.log_softmax((hidden @ weight.T)[:, :VOCABULARY] / temperature, dim=-1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(dim=-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_size", [1, 4, 1024])
def test_values_and_gradients_equal_brute_force_at_any_chunk_size(temperature, chunk_size):
    hidden, weight, targets = inputs()
    shard = VocabularyShard(start=0, size=VOCABULARY)
    got = linear_log_probs(hidden, weight, targets, shard, temperature=temperature, chunk_size=chunk_size)
    expected = brute_force(hidden, weight, targets, temperature)
    upstream = torch.randn(2, TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    ours = torch.autograd.grad((torch.stack(got) * upstream).sum(), (hidden, weight))
    theirs = torch.autograd.grad((torch.stack(expected) * upstream).sum(), (hidden, weight))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_gradcheck_in_float64():
    hidden, weight, targets = inputs()
    shard = VocabularyShard(start=0, size=VOCABULARY)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_log_probs(h, w, targets, shard, temperature=1.3, chunk_size=4), (hidden, weight)
    )


def test_padding_takes_no_probability_mass():
    hidden, weight, targets = inputs()
    huge = weight.detach().clone()
    huge[VOCABULARY:] = 1e3
    shard = VocabularyShard(start=0, size=VOCABULARY)
    plain, _ = linear_log_probs(hidden, weight, targets, shard)
    padded, entropy = linear_log_probs(hidden, huge, targets, shard)
    assert torch.equal(plain, padded)
    assert torch.isfinite(entropy).all()


def test_a_hand_computed_case():
    # Logits (0, ln 3) give probabilities (1/4, 3/4).
    hidden = torch.tensor([[1.0]])
    weight = torch.tensor([[0.0], [torch.tensor(3.0).log()]])
    log_probs, entropy = linear_log_probs(hidden, weight, torch.tensor([1]), VocabularyShard(start=0, size=2))
    assert log_probs.item() == pytest.approx(-0.2876820724, abs=1e-6)
    assert entropy.item() == pytest.approx(0.25 * 1.3862943611 + 0.75 * 0.2876820724, abs=1e-6)


def test_no_tokens_is_no_work():
    _, weight, _ = inputs()
    hidden = torch.zeros(0, HIDDEN, dtype=torch.float64, requires_grad=True)
    log_probs, _ = linear_log_probs(hidden, weight, torch.zeros(0, dtype=torch.int64), VocabularyShard(0, VOCABULARY))
    log_probs.sum().backward()
    assert log_probs.shape == (0,) and weight.grad.abs().max() == 0
