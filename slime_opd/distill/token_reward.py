"""thunlp/OPD's estimator: a reward on each of K candidate tokens. Pure. Notation: R response tokens, K candidates."""

from __future__ import annotations

import torch
from torch import Tensor

from slime_opd.algorithm.policy_loss import clipped_policy_loss

WEIGHT_MODES = ("student_p", "teacher_p", "none")

# Whether a strategy's weights are scaled to add up to 1 over the set.
NORMALIZED = {
    "only_stu": True,
    "only_tch": True,
    "intersection": True,
    "union": True,
    "union-intersection": False,
}


def token_reward_direct(
    log_p: Tensor,
    old_log_p: Tensor,
    log_q: Tensor,
    valid: Tensor,
    *,
    weight_mode: str,
    normalize: bool,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> tuple[Tensor, Tensor]:
    """The policy loss of each token, summed over its candidates, [R], and the candidates' rewards, [R, K].

    Li et al. 2026, arXiv:2604.13016, as its code (`token_reward_direct`) has it: reward_k = −w_k (log p_k − log q_k),
    with p the policy that starts the rollout's steps, taken as the advantage of candidate k in PPO's clipped loss on
    p_k / p_old,k. Weights: `student_p` and `teacher_p` a model's probabilities, `none` all alike; with `normalize` they
    add up to 1 over the set (so `none` is a mean). All [R, K] at full-vocabulary normalisation; only log_p takes a
    gradient.

    Rewards and weights are constants to the optimizer, so on policy the gradient is Σ w_k (log p_k − log q_k) ∇ log
    p_k. Over the whole vocabulary with `student_p` that is the gradient of KL(p ‖ q) exactly. Over a set it vanishes
    where the models agree, as every reward does, but no term holds the mass outside, and it is not the gradient of the
    KL over the set: where p = c q there, that is 0 and this is log c · Σ w_k ∇ log p_k.
    """
    # Invalid entries may hold inf or NaN; replace them before multiplying by zero.
    log_p, old_log_p, log_q = (
        values.masked_fill(~valid, 0.0) for values in (log_p, old_log_p.detach(), log_q.detach())
    )
    base = {"student_p": old_log_p, "teacher_p": log_q, "none": torch.zeros_like(log_q)}[weight_mode]
    weights = base.masked_fill(~valid, -torch.inf)
    weights = weights.softmax(dim=1) if normalize else weights.exp()
    # A set without entries has no softmax.
    weights = torch.where(valid, weights, 0.0)
    reward = -(old_log_p - log_q) * weights
    policy = clipped_policy_loss(log_p, old_log_p, reward, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    return policy.loss.sum(dim=1), reward
