"""A model's distribution over a vocabulary that is split over tensor-parallel ranks, for one chunk of tokens.

Its terms (log-probs of ids, entropy, mass of the rest, divergence from a teacher) are small tensors, the same on every
rank; `logit_gradients` turns the gradients with respect to them into that of the logits, by hand: a plain all-reduce in
a forward has no backward. No autograd runs over the vocabulary, so a chunk costs its logits and two or three buffers of
their size.

Notation: C tokens of a chunk, V vocabulary with padding, V/tp this rank's share of it, K ids per token, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# Its probability is exactly 0, and it is far enough from the ends of float32 that a product with a gradient stays
# finite: 0 times infinity would be NaN.
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

    def sums(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Each of this rank's tensors summed over the ranks, in one collective; all of one shape."""
        if self.group is None:
            return tensors
        stacked = torch.stack(tensors)
        dist.all_reduce(stacked, group=self.group)
        return tuple(stacked)

    def gathered(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors, stacked in a new first dimension."""
        if self.group is None:
            return tensor[None]
        parts = tensor.new_empty((self.group.size(), *tensor.shape))
        dist.all_gather(list(parts), tensor.contiguous(), group=self.group)
        return parts

    def local(self, ids: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Ids as rows of this shard (0 where another rank has them), and whether they are here."""
        local = ids.long() - self.start
        is_local = (local >= 0) & (local < rows)
        return torch.where(is_local, local, 0), is_local


@dataclass(frozen=True)
class TermGradients:
    """Gradients of a loss with respect to the terms of a distribution; None or empty for a term that it does not have.

    log_probs: pairs (ids [C, K], gradient [C, K]). entropies: (entropies [C], gradient [C]). log_rest: (ids [C, K],
    valid [C, K], log_rest [C], gradient [C]). divergence: (its slope [C, V/tp] with respect to the logits, gradient
    [C]).
    """

    log_probs: tuple[tuple[Tensor, Tensor], ...] = ()
    entropies: tuple[Tensor, Tensor] | None = None
    log_rest: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    divergence: tuple[Tensor, Tensor] | None = None

    def joined(self, other: TermGradients) -> TermGradients:
        """These and those of other terms of the same distribution."""
        return TermGradients(
            self.log_probs + other.log_probs,
            self.entropies or other.entropies,
            self.log_rest or other.log_rest,
            self.divergence or other.divergence,
        )


def chunk_logits(hidden: Tensor, weight: Tensor, shard: VocabularyShard) -> Tensor:
    """This rank's logits [C, V/tp] of hidden [C, H] and weight [V/tp, H], at least float32; padding has no mass."""
    logits = hidden @ weight.T
    return without_padding(logits.to(torch.promote_types(hidden.dtype, torch.float32)), shard)


def without_padding(logits: Tensor, shard: VocabularyShard) -> Tensor:
    """The logits [C, V/tp], in whose own memory ids past the shard's size lose all mass."""
    real = shard.size - shard.start
    if real < logits.shape[1]:
        logits[:, max(real, 0) :] = _PADDING_LOGIT
    return logits


class Distribution:
    """softmax(logits / temperature) of one chunk.

    `log_p`, `p`: this rank's shard, [C, V/tp]. The logits' memory is taken over and written to.
    """

    def __init__(self, logits: Tensor, shard: VocabularyShard, temperature: float = 1.0) -> None:
        self.shard, self.temperature = shard, temperature
        if temperature != 1.0:
            logits.div_(temperature)
        normalizer = torch.logsumexp(shard.gathered(torch.logsumexp(logits, dim=1)), dim=0)
        self.log_p = logits.sub_(normalizer[:, None])
        self.p = self.log_p.exp()

    def log_probs(self, ids: Tensor) -> Tensor:
        """Log-probs of ids [C, K] of the whole vocabulary, [C, K]."""
        local, is_local = self.shard.local(ids, self.log_p.shape[1])
        (log_probs,) = self.shard.sums(self.log_p.gather(1, local) * is_local)
        return log_probs

    def entropies(self) -> Tensor:
        """−Σ p log p, [C]."""
        (expected,) = self.shard.sums(torch.linalg.vecdot(self.p, self.log_p))
        return -expected

    def log_rest(self, ids: Tensor, valid: Tensor) -> Tensor:
        """Log of the mass outside the valid ids [C, K], [C]; summed over those outside, so exact however small."""
        outside = self.p.masked_fill(self._inside(ids, valid), 0.0).sum(dim=1)
        (outside,) = self.shard.sums(outside)
        return outside.clamp(min=torch.finfo(outside.dtype).tiny).log()

    def top_k(self, k: int) -> tuple[Tensor, Tensor]:
        """The k most likely ids of each token and their log-probs, both [C, k], most likely first."""
        log_p, rows = self.log_p.topk(min(k, self.log_p.shape[1]), dim=1)
        if self.shard.group is None:
            return rows + self.shard.start, log_p
        log_p = self.shard.gathered(log_p).movedim(0, 1).flatten(1)
        ids = self.shard.gathered(rows + self.shard.start).movedim(0, 1).flatten(1)
        log_p, indices = log_p.topk(k, dim=1)
        return ids.gather(1, indices), log_p

    def logit_gradients(self, gradients: TermGradients) -> Tensor:
        """The gradient of the logits (before the temperature), [C, V/tp], from those of the terms. With p = softmax(z):

            ∂ log p_a / ∂z_j = [j = a] − p_j            ∂ H / ∂z_j = −p_j (log p_j + H)
            ∂ log p_rest / ∂z_j = [j outside] p_j / p_rest − p_j

        Uses up the distribution: its buffers are overwritten.
        """
        wrt_p = torch.zeros_like(self.p[:, 0])
        for _, gradient in gradients.log_probs:
            wrt_p -= gradient.sum(dim=1)
        if gradients.log_rest is not None:
            wrt_p -= gradients.log_rest[3]
        factor = wrt_p[:, None]
        if gradients.entropies is not None:
            entropies, gradient = gradients.entropies
            factor = self.log_p.add_(entropies[:, None]).mul_(-gradient[:, None]).add_(factor)
        if gradients.log_rest is not None:
            ids, valid, log_rest, gradient = gradients.log_rest
            inside = self._inside(ids, valid)
            factor = factor + (gradient * (-log_rest).exp())[:, None].masked_fill(inside, 0.0)
        total = self.p.mul_(factor)
        if gradients.divergence is not None:
            slope, gradient = gradients.divergence
            total.addcmul_(slope, gradient[:, None])
        for ids, gradient in gradients.log_probs:
            local, is_local = self.shard.local(ids, total.shape[1])
            total.scatter_add_(1, local, gradient * is_local)
        return total if self.temperature == 1.0 else total.div_(self.temperature)

    def _inside(self, ids: Tensor, valid: Tensor) -> Tensor:
        """Whether each row of this shard is among the token's valid ids, bool [C, V/tp]."""
        local, is_local = self.shard.local(ids, self.p.shape[1])
        counts = torch.zeros(self.p.shape, dtype=torch.int8, device=self.p.device)
        return counts.scatter_add_(1, local, (is_local & valid).to(torch.int8)).bool()


@dataclass(frozen=True)
class FullDivergence:
    """A divergence over the whole vocabulary: `values` [C] and, per token, their gradient wrt the student's scaled
    logits.

    `slope` [C, V/tp]. `reverse_kl`, `forward_kl` [C]: both directions, whatever the kind.
    """

    values: Tensor
    slope: Tensor
    reverse_kl: Tensor
    forward_kl: Tensor


def full_divergence(student: Distribution, teacher: Distribution, *, kind: str, beta: float) -> FullDivergence:
    """The divergence of `distill.divergences.divergence` over the whole vocabulary, with its gradient.

    With u_j = ∂D/∂p_j up to a constant, ∂D/∂z_j = p_j (u_j − Σ p u):

        reverse KL  u = log p − log q         forward KL  p u = −q         JSD  u = (1 − β)(log p − log m)

    Uses up the teacher's distribution.
    """
    sums = student.shard.sums
    if kind == "jsd":
        # log m in place of log q, once the KLs have used that.
        difference = student.log_p - teacher.log_p
    else:
        difference = torch.sub(student.log_p, teacher.log_p, out=teacher.log_p)
    reverse, forward = sums(
        torch.linalg.vecdot(student.p, difference), torch.linalg.vecdot(teacher.p, difference).neg_()
    )
    if kind == "reverse_kl":
        return FullDivergence(reverse, difference.sub_(reverse[:, None]).mul_(student.p), reverse, forward)
    if kind == "forward_kl":
        return FullDivergence(forward, torch.sub(student.p, teacher.p, out=teacher.p), reverse, forward)
    mixture = torch.add(student.p * (1 - beta), teacher.p, alpha=beta, out=difference).log_()
    # Where both have underflowed to 0, neither's product with a log matters.
    mixture.clamp_(min=torch.finfo(mixture.dtype).min / 4)
    teacher_kl = torch.linalg.vecdot(teacher.p, teacher.log_p.sub_(mixture))
    log_ratio = torch.sub(student.log_p, mixture, out=mixture)
    teacher_kl, student_kl = sums(teacher_kl, torch.linalg.vecdot(student.p, log_ratio))
    values = beta * teacher_kl + (1 - beta) * student_kl
    slope = log_ratio.sub_(student_kl[:, None]).mul_(student.p).mul_(1 - beta)
    return FullDivergence(values, slope, reverse, forward)
