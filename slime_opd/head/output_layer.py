"""The output layer and the objective, chunk by chunk: logits of a micro-batch never exist at one time.

The objective is a sum over tokens whose weights are known before the forward, so a chunk's gradient can be taken while
its logits are there: they are computed once, where a recomputing backward would do it twice.

Notation: R tokens, C tokens of a chunk, H hidden size, V/tp this rank's share of the padded vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from slime_opd.head.vocabulary import Distribution, VocabularyShard, chunk_logits
from slime_opd.objective.streams import Objective


class Head(Protocol):
    """The objective of one chunk."""

    def __call__(self, logits: Tensor, rows: slice) -> tuple[Objective, Tensor]:
        """The objective of the tokens `rows` and its gradient wrt their logits [C, V/tp]; may overwrite the logits."""


def chunked_objective(hidden: Tensor, weight: Tensor, shard: VocabularyShard, head: Head, chunk_size: int) -> Objective:
    """The objective of all tokens; its loss is differentiable in hidden and weight.

    hidden [R, H] is the same on every tensor-parallel rank; weight [V/tp, H] is this rank's. The gradient of hidden is
    summed over the ranks. Extra memory: a few [C, V/tp] buffers in float32, and gradients of the inputs' shapes.
    """
    parts: list[Objective] = []
    loss = _ChunkedLoss.apply(hidden, weight, shard, head, chunk_size, parts)
    total = Objective.of_chunks(parts)
    return Objective(loss, total.totals, total.means, total.histograms)


# Of the gradient while it is in float16, where a token's share of a large batch would be lost before the loss scale
# reaches it.
_FLOAT16_SCALE = 1024.0


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, shard, head, chunk_size, parts):
        scale = _FLOAT16_SCALE if hidden.dtype is torch.float16 else 1.0
        grad_hidden = torch.empty_like(hidden)
        # Summed over chunks, so kept in at least float32 until the end.
        grad_weight = torch.zeros(
            weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device
        )
        for rows in chunks(len(hidden), chunk_size):
            objective, grad_logits = head(chunk_logits(hidden[rows], weight, shard), rows)
            if scale != 1.0:
                grad_logits = grad_logits * scale
            grad_logits = grad_logits.to(hidden.dtype)
            torch.mm(grad_logits, weight, out=grad_hidden[rows])
            if grad_weight.dtype == hidden.dtype:
                grad_weight.addmm_(grad_logits.T, hidden[rows])
            else:
                grad_weight += grad_logits.T @ hidden[rows]
            parts.append(objective)
        if shard.group is not None:
            dist.all_reduce(grad_hidden, group=shard.group)
        ctx.gradients, ctx.scale = (grad_hidden, grad_weight.to(weight.dtype)), scale
        return torch.stack([part.loss for part in parts]).sum()

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.gradients
        del ctx.gradients
        # A number in float32, which may be larger than float16 can hold.
        factor = grad_loss / ctx.scale
        return grad_hidden.mul_(factor), grad_weight.mul_(factor), None, None, None, None


@torch.no_grad()
def score(
    hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabularyShard, *, temperature: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Log-probs of targets int64 [R] and entropies, both [R], at least float32, the same on every rank; no gradient.

    The log-prob of a target past the vocabulary is NaN: the model has no such token.
    """
    log_probs = torch.empty(targets.shape, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    entropies = torch.empty_like(log_probs)
    for rows in chunks(len(targets), chunk_size):
        distribution = Distribution(chunk_logits(hidden[rows], weight, shard), shard, temperature)
        log_probs[rows] = distribution.log_probs(targets[rows, None])[:, 0]
        entropies[rows] = distribution.entropies()
    return log_probs.masked_fill_(targets >= shard.size, torch.nan), entropies


def chunks(length: int, size: int) -> list[slice]:
    """Slices of at most `size`, in order; for length 0 one empty slice, so that there is always a first."""
    return [slice(start, min(start + size, length)) for start in range(0, max(length, 1), size)]
