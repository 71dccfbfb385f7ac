"""Divergences between two distributions, over any support. Pure.

Notation: R response tokens, K entries; p the student, q the teacher.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slime_opd.schedule import KINDS

REMAINDERS = ("tail", "truncated", "renormalized")

# An entry that is not there: its probability is exactly 0 and its log stays finite, so that 0 times it is 0 and not
# NaN.
_ABSENT = -1e30

# The smallest mass that a teacher's log-probs in float32 leave for the rest: their sum is not known better than that.
_SMALLEST_REST = 1e-7


def divergence(log_p: Tensor, log_q: Tensor, *, kind: str, beta: float = 0.5) -> Tensor:
    """D between exp(log_p) and exp(log_q) over the last dimension: [..., K] to [...], differentiable in log_p alone.

        reverse_kl  Σ p (log p − log q)        forward_kl  Σ q (log q − log p)
        jsd         β KL(q ‖ m) + (1 − β) KL(p ‖ m),   m = β q + (1 − β) p

    Agarwal et al. 2024, arXiv:2306.13649, section 2: the generalised JSD, whose β weighs the teacher. As β goes to 0,
    jsd / β goes to the forward KL; as it goes to 1, jsd / (1 − β) goes to the reverse KL. An entry that neither has
    (-inf, or far below any of float32's log-probs) counts nothing and has gradient 0. Where the student has mass and
    the teacher has none the reverse KL is inf, as it should be; so is the forward KL the other way round.
    """
    log_q = log_q.detach()
    absent = (log_p.detach() <= _ABSENT / 2) & (log_q <= _ABSENT / 2)
    # One value for both, so that an entry that is not there has no difference and takes no gradient.
    log_p, log_q = log_p.masked_fill(absent, _ABSENT), log_q.masked_fill(absent, _ABSENT)
    p, q = log_p.exp(), log_q.exp()
    if kind == "reverse_kl":
        return _mean_log_ratio(p, log_p - log_q)
    if kind == "forward_kl":
        return _mean_log_ratio(q, log_q - log_p)
    if kind != "jsd":
        raise ValueError(f"unknown divergence {kind!r}; expected one of {', '.join(KINDS)}")
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
    return beta * _mean_log_ratio(q, log_q - log_m) + (1 - beta) * _mean_log_ratio(p, log_p - log_m)


def distribution(
    log_p: Tensor, log_q: Tensor, valid: Tensor, log_p_rest: Tensor, log_q_rest: Tensor, *, remainder: str
) -> tuple[Tensor, Tensor]:
    """Log-probs on a set of entries, [R, K] with valid bool [R, K], as what a divergence is taken of.

    log_p_rest, log_q_rest: [R], log of the mass outside the valid entries. `remainder` says what becomes of it:

        tail          one more entry, K + 1: a coarser view of the same two distributions
        truncated     nothing: two measures whose masses differ
        renormalized  nothing, and the set's mass is scaled to 1

    Only the tail is to be used: both sides are distributions whatever the student does, so the divergence is least, and
    its gradient 0, where they agree, and mass that leaves the set is seen. Truncated, the gradient does not vanish
    where the models agree (the JSD's does): moving mass out of the set pays for the reverse KL, into it for the
    forward. Renormalised it does, but no term holds the set's mass, so that the student may leave the set. Both are
    here because papers used them.

    A set without entries has divergence 0: with a tail both masses outside are 1, and without one there is nothing.
    Entries that are not valid are far below any log-prob, in both, and take no gradient.
    """
    log_p, log_q = log_p.masked_fill(~valid, _ABSENT), log_q.masked_fill(~valid, _ABSENT)
    if remainder == "tail":
        return torch.cat([log_p, log_p_rest[:, None]], dim=1), torch.cat([log_q, log_q_rest[:, None]], dim=1)
    if remainder == "renormalized":
        some = valid.any(dim=1, keepdim=True)
        scale = [torch.logsumexp(one, dim=1, keepdim=True).masked_fill(~some, 0.0) for one in (log_p, log_q)]
        return log_p - scale[0], log_q - scale[1]
    if remainder != "truncated":
        raise ValueError(f"unknown remainder {remainder!r}; expected one of {', '.join(REMAINDERS)}")
    return log_p, log_q


def log_rest(log_q: Tensor, valid: Tensor) -> Tensor:
    """log(1 − Σ exp(log_q)) over the valid entries, [R, K] to [R], for a model whose other log-probs are not known.

    Not below log 1e-7: log-probs that came as float32 do not say more about what they leave.
    """
    mass = log_q.double().exp().masked_fill(~valid, 0.0).sum(dim=1)
    return (1 - mass).clamp(min=_SMALLEST_REST).log().to(log_q.dtype)


def _mean_log_ratio(p: Tensor, log_ratio: Tensor) -> Tensor:
    """Σ p · log_ratio over the last dimension, where 0 · inf is 0: what p does not hold is not in a mean under p."""
    return (p * torch.where(p > 0, log_ratio, 0.0)).sum(dim=-1)
