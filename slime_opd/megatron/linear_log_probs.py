"""Log-probs and entropy straight from hidden states: the output layer, chunk by chunk.

Logits of a whole micro-batch are the largest tensor of a training step. Here they exist for one chunk
of tokens at a time, in the forward and again in the backward, which recomputes them; what lives between the two
is [R] numbers. The vocabulary may be split over tensor-parallel ranks, so forward and backward are
written by hand: a plain all-reduce in a forward has no backward.

Notation: R scored tokens, H hidden size, V padded vocabulary, V/tp this rank's share of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# Its probability is exactly 0, and it is far enough from the ends of float32 that a product with a gradient stays finite:
# 0 times infinity would be NaN.
_PADDING_LOGIT = -1e30


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's rows of the output layer.

    `start`: the vocabulary id of the first row. `size`: ids that are real; rows from `size` on are padding and
    never take probability mass. `group`: the tensor-parallel process group, or None for one rank.
    """

    start: int
    size: int
    group: dist.ProcessGroup | None = None


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    shard: VocabularyShard,
    *,
    temperature: float = 1.0,
    chunk_size: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Log-probs of `targets` and entropies under softmax(hidden @ weight.T / temperature).

    hidden [R, H] is the same on every tensor-parallel rank; weight [V/tp, H]; targets int64 [R], ids of the
    whole vocabulary. Returns (log_probs [R], entropies [R]), float32 (float64 for float64 inputs), the same on every rank.
    Differentiable in hidden and weight; the gradient of hidden is summed over the group.
    """
    return _LinearLogProbs.apply(hidden, weight, targets, shard, temperature, chunk_size)


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, shard, temperature, chunk_size):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        log_probs = torch.empty(targets.shape, dtype=dtype, device=hidden.device)
        entropies = torch.empty_like(log_probs)
        log_normalizers = torch.empty_like(log_probs)
        for rows in _chunks(len(targets), chunk_size):
            logits = _logits(hidden[rows], weight, shard, temperature, dtype)
            target_logits, log_normalizer, expected = _reduce(logits, targets[rows], shard)
            log_normalizers[rows] = log_normalizer
            log_probs[rows] = target_logits - log_normalizer
            # H = log Z − E[logit]
            entropies[rows] = log_normalizer - expected
        ctx.save_for_backward(hidden, weight, targets, log_normalizers, entropies)
        ctx.settings = (shard, temperature, chunk_size)
        return log_probs, entropies

    @staticmethod
    def backward(ctx, grad_log_probs, grad_entropies):
        hidden, weight, targets, log_normalizers, entropies = ctx.saved_tensors
        shard, temperature, chunk_size = ctx.settings
        dtype = log_normalizers.dtype
        grad_hidden = torch.empty_like(hidden)
        # Summed over chunks, so kept in at least float32 until the end.
        grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        for rows in _chunks(len(targets), chunk_size):
            logits = _logits(hidden[rows], weight, shard, temperature, dtype)
            log_p = logits.sub_(log_normalizers[rows, None])
            probabilities = log_p.exp()
            # d log p(a) / d logit_j = [j = a] − p_j ;  d H / d logit_j = −p_j (log p_j + H)
            grad_logits = log_p.add_(entropies[rows, None]).mul_(-grad_entropies[rows, None])
            grad_logits.sub_(grad_log_probs[rows, None]).mul_(probabilities)
            local, is_local = _local_targets(targets[rows], shard, weight.shape[0])
            grad_logits.scatter_add_(1, local[:, None], (grad_log_probs[rows] * is_local)[:, None])
            grad_logits = grad_logits.div_(temperature).to(hidden.dtype)
            torch.mm(grad_logits, weight, out=grad_hidden[rows])
            grad_weight += grad_logits.T @ hidden[rows]
        if shard.group is not None:
            dist.all_reduce(grad_hidden, group=shard.group)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _chunks(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _logits(hidden: Tensor, weight: Tensor, shard: VocabularyShard, temperature: float, dtype: torch.dtype) -> Tensor:
    """This rank's logits of one chunk, [chunk, V/tp]; padding is at _PADDING_LOGIT."""
    logits = (hidden @ weight.T).to(dtype).div_(temperature)
    real = shard.size - shard.start
    if real < weight.shape[0]:
        logits[:, max(real, 0) :] = _PADDING_LOGIT
    return logits


def _local_targets(targets: Tensor, shard: VocabularyShard, rows: int) -> tuple[Tensor, Tensor]:
    """Targets as rows of this shard (0 where another rank has them), and whether they are here."""
    local = targets - shard.start
    is_local = (local >= 0) & (local < rows)
    return torch.where(is_local, local, 0), is_local


def _reduce(logits: Tensor, targets: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor, Tensor]:
    """Target logit, log-normaliser and expected logit over the whole vocabulary, each [chunk]."""
    local, is_local = _local_targets(targets, shard, logits.shape[1])
    maximum = logits.amax(dim=1)
    if shard.group is not None:
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=shard.group)
    target = logits.gather(1, local[:, None]).squeeze(1) * is_local
    exponentials = (logits - maximum[:, None]).exp_()
    total = exponentials.sum(dim=1)
    weighted = exponentials.mul_(logits).sum(dim=1)
    sums = torch.stack([target, total, weighted])
    if shard.group is not None:
        dist.all_reduce(sums, group=shard.group)
    target, total, weighted = sums
    return target, maximum + total.log(), weighted / total
