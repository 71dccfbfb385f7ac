"""Every objective written out token by token in float64, for the tests of the chunked and of the vocabulary-parallel
pass.

Nothing here is shared with the implementation but the names of its options and columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

TOKENS, HIDDEN, VOCABULARY, PADDED, K = 10, 6, 29, 32, 3
STRATEGIES = ("only_stu", "only_tch", "intersection", "union", "union-intersection")
# Tokens of a response whose teacher failed, where it is remote.
FAILED = slice(4, 6)
POLICY = {
    "clip_low": 0.2,
    "clip_high": 0.28,
    "dual_clip": 3.0,
    "entropy_coefficient": 0.05,
    "kl_coefficient": 0.2,
    "kl_kind": "k2",
    "use_rollout_log_probs": False,
}


@dataclass(frozen=True)
class Case:
    """One objective: options of the divergence and of the penalty (None: none), and how tokens are scored."""

    name: str
    divergence: dict[str, Any] | None = None
    penalty: dict[str, Any] | None = None
    top_k: int = 0
    temperature: float = 1.0
    teacher_temperature: float = 1.0
    remote: bool = False
    later_step: bool = False
    policy: dict[str, Any] = field(default_factory=lambda: POLICY)


def cases() -> list[Case]:
    """Objective × strategy × remainder or weight mode, with a Megatron teacher and with a server."""
    penalty = {"coefficient": 0.5, "clamp": 0.6}
    found = [
        Case("penalty", penalty=penalty),
        Case("penalty at another temperature", penalty=penalty, temperature=0.7, teacher_temperature=1.3),
        Case("penalty of the first policy", penalty=penalty, later_step=True),
        Case("penalty refreshed", penalty=penalty | {"refresh_student": True}, later_step=True),
    ]
    for kind in ("reverse_kl", "forward_kl", "jsd"):
        base = {"kind": kind, "coefficient": 0.9, "beta": 0.3}
        found.append(Case(f"{kind} full", base))
        found.append(Case(f"{kind} full, temperatures", base, penalty, temperature=0.8, teacher_temperature=1.4))
        for strategy in STRATEGIES:
            for remainder in ("tail", "truncated", "renormalized"):
                options = base | {"strategy": strategy, "remainder": remainder}
                found.append(Case(f"{kind} {strategy} {remainder}", options, top_k=K))
            found.append(Case(f"{kind} {strategy} remote", base | {"strategy": strategy}, top_k=K, remote=True))
    for strategy in STRATEGIES:
        for mode in ("student_p", "teacher_p", "none"):
            options = {"kind": "token_reward_direct", "coefficient": 0.9, "strategy": strategy, "weight_mode": mode}
            found.append(Case(f"token_reward {strategy} {mode}", options, top_k=K))
        found.append(Case(f"token_reward {strategy} remote", options, penalty, top_k=K, remote=True))
        found.append(Case(f"token_reward {strategy} later", options, penalty, top_k=K, later_step=True))
    found.append(Case("reverse_kl union, temperatures", base | {"strategy": "union"}, penalty, K, 0.8, 1.4))
    return found


def problem(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """hidden [R, H], weight [V, H] with padding, targets [R], the teacher's own two, and the columns."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    hidden, weight = draw(TOKENS, HIDDEN), draw(PADDED, HIDDEN)
    teacher_hidden, teacher_weight = hidden + 0.4 * draw(TOKENS, HIDDEN), weight + 0.2 * draw(PADDED, HIDDEN)
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    positive = lambda: draw(TOKENS).abs() + 0.1  # noqa: E731
    mask = torch.ones(TOKENS, dtype=torch.float64)
    mask[2] = 0
    log_p = _log_softmax(hidden, weight, case.temperature).gather(1, targets[:, None])[:, 0]
    log_q = _log_softmax(teacher_hidden, teacher_weight, case.teacher_temperature)
    columns = {
        "advantages": draw(TOKENS),
        "loss_mask": mask,
        "policy_weights": positive() * mask / TOKENS,
        "penalty_weights": positive(),
        "divergence_base": positive() * mask / TOKENS,
        "divergence_weights": positive(),
        "ref_log_probs": log_p + 0.3 * draw(TOKENS),
        "rollout_log_probs": log_p + 0.01 * draw(TOKENS),
        "position_third": (torch.arange(TOKENS) * 3 // TOKENS).double(),
        "correct": (torch.arange(TOKENS) % 2).double(),
    }
    # What a masked token has is nobody's business.
    columns["ref_log_probs"][2] = columns["rollout_log_probs"][2] = math.nan
    if case.remote or (case.penalty is not None and case.divergence is None):
        columns["teacher_log_probs"] = log_q.gather(1, targets[:, None])[:, 0]
    if case.later_step:
        columns["log_probs"] = log_p + 0.4 * draw(TOKENS)
    if case.remote:
        _add_answers(columns, case, hidden, weight, log_q)
    if case.later_step and case.divergence is not None:
        _add_old_candidates(columns, log_q, draw, generator)
    if case.divergence is None and case.penalty is not None:
        columns["teacher_log_probs"][1] = math.nan
    floats = {name: values.to(dtype) if values.is_floating_point() else values for name, values in columns.items()}
    tensors = {"hidden": hidden, "weight": weight, "teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight}
    return {name: values.to(dtype) for name, values in tensors.items()} | {"targets": targets, "columns": floats}


def _add_answers(columns: dict[str, Tensor], case: Case, hidden: Tensor, weight: Tensor, log_q: Tensor) -> None:
    """What a server is asked for, and NaN where it failed."""
    strategy = case.divergence["strategy"]
    if strategy not in ("only_tch", "intersection"):
        ids = _log_softmax(hidden, weight, case.teacher_temperature).topk(K).indices
        columns["student_top_ids"] = ids.int()
        columns["teacher_on_student_log_probs"] = log_q.gather(1, ids)
        columns["teacher_on_student_log_probs"][FAILED] = math.nan
    if strategy != "only_stu":
        top = log_q.topk(K)
        columns["teacher_top_ids"], columns["teacher_top_log_probs"] = top.indices.int(), top.values.clone()
        columns["teacher_top_log_probs"][FAILED] = math.nan
        columns["teacher_top_ids"][FAILED] = 0
    columns["teacher_log_probs"][FAILED] = math.nan


def _add_old_candidates(columns: dict[str, Tensor], log_q: Tensor, draw: Any, generator: torch.Generator) -> None:
    """Candidates of the rollout's first policy: two to four of them, the rest −1."""
    ids = torch.stack([torch.randperm(VOCABULARY, generator=generator)[:4] for _ in range(TOKENS)])
    ids[::3, 2:] = -1
    columns["candidate_ids"] = ids.int()
    columns["candidate_log_probs"] = -draw(TOKENS, 4).abs() - 0.5
    columns["candidate_teacher_log_probs"] = log_q.gather(1, ids.clamp(min=0))


def loss_of(case: Case, given: dict[str, Any], hidden: Tensor, weight: Tensor) -> Tensor:
    """The loss of all tokens, differentiable in hidden and weight."""
    columns, targets = given["columns"], given["targets"]
    log_policy = _log_softmax(hidden, weight, case.temperature)
    log_p = _log_softmax(hidden, weight, case.teacher_temperature)
    log_q = _log_softmax(given["teacher_hidden"], given["teacher_weight"], case.teacher_temperature)
    policy, total = case.policy, torch.zeros((), dtype=hidden.dtype)
    for t in range(TOKENS):
        now = log_policy[t, targets[t]]
        weight_of = columns["policy_weights"][t]
        if weight_of > 0:
            old = columns["log_probs"][t] if "log_probs" in columns else now.detach()
            advantage = columns["advantages"][t]
            if case.penalty is not None:
                advantage = advantage - _penalty(case, columns, t, log_p[t, targets[t]], now, old, log_q, targets)
            total = total + weight_of * _clipped(now, old, advantage, policy)
            total = total + policy["entropy_coefficient"] * weight_of * (log_policy[t].exp() * log_policy[t]).sum()
            total = total + policy["kl_coefficient"] * weight_of * (now - columns["ref_log_probs"][t]) ** 2 / 2
        failed = case.remote and FAILED.start <= t < FAILED.stop
        if case.divergence is not None and not failed:
            of_token = _divergence(case, columns, t, log_p[t], log_q[t])
            counted = columns["divergence_base"][t] * columns["divergence_weights"][t]
            total = total + case.divergence["coefficient"] * counted * of_token
    return total


def _log_softmax(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax((hidden @ weight.T)[:, :VOCABULARY] / temperature, dim=1)


def _clipped(now: Tensor, old: Tensor, advantage: Tensor, policy: dict[str, Any]) -> Tensor:
    ratio = (now - old).exp()
    held = ratio.clamp(1 - policy["clip_low"], 1 + policy["clip_high"])
    loss = torch.maximum(-ratio * advantage, -held * advantage)
    if policy["dual_clip"] is not None and advantage < 0:
        loss = torch.minimum(loss, -policy["dual_clip"] * advantage)
    return loss


def _penalty(case, columns, t, student_now, now, old, log_q, targets) -> Tensor:
    teacher = columns.get("teacher_log_probs", log_q.gather(1, targets[:, None])[:, 0])[t]
    if teacher.isnan():
        return torch.zeros_like(teacher)
    if case.penalty.get("refresh_student") or case.temperature != case.teacher_temperature:
        student = student_now.detach()
    else:
        student = old
    signal = (student - teacher).clamp(-case.penalty["clamp"], case.penalty["clamp"])
    return case.penalty["coefficient"] * columns["penalty_weights"][t] * signal


def _divergence(case: Case, columns: dict[str, Tensor], t: int, log_p: Tensor, log_q: Tensor) -> Tensor:
    options = case.divergence
    if not case.top_k:
        return _between(log_p.exp(), log_q.exp(), options["kind"], options["beta"])
    of_student, of_teacher = set(log_p.topk(K).indices.tolist()), set(log_q.topk(K).indices.tolist())
    ids = sorted(
        {
            "only_stu": of_student,
            "only_tch": of_teacher,
            "intersection": of_student & of_teacher,
            "union": of_student | of_teacher,
            "union-intersection": of_student ^ of_teacher,
        }[options["strategy"]]
    )
    old, of_ids = log_p[ids].detach(), log_q[ids]
    if "candidate_ids" in columns:
        chosen = columns["candidate_ids"][t] >= 0
        ids = columns["candidate_ids"][t][chosen].tolist()
        old, of_ids = columns["candidate_log_probs"][t][chosen], columns["candidate_teacher_log_probs"][t][chosen]
    if options["kind"] == "token_reward_direct":
        return _token_reward(log_p[ids], old, of_ids, options, case.policy)
    p, q = log_p[ids].exp(), of_ids.exp()
    remainder = options.get("remainder", "tail")
    if remainder == "tail":
        p, q = torch.cat([p, 1 - p.sum(0, keepdim=True)]), torch.cat([q, 1 - q.sum(0, keepdim=True)])
    elif remainder == "renormalized" and ids:
        p, q = p / p.sum(), q / q.sum()
    return _between(p, q, options["kind"], options["beta"])


def _between(p: Tensor, q: Tensor, kind: str, beta: float) -> Tensor:
    if kind == "reverse_kl":
        return (p * (p / q).log()).sum()
    if kind == "forward_kl":
        return (q * (q / p).log()).sum()
    m = beta * q + (1 - beta) * p
    return beta * (q * (q / m).log()).sum() + (1 - beta) * (p * (p / m).log()).sum()


def _token_reward(log_p: Tensor, old: Tensor, log_q: Tensor, options: dict[str, Any], policy: dict[str, Any]) -> Tensor:
    weights = {"student_p": old.exp(), "teacher_p": log_q.exp(), "none": torch.ones_like(log_q)}[options["weight_mode"]]
    if options["strategy"] != "union-intersection":
        weights = weights / weights.sum()
    total = torch.zeros((), dtype=log_p.dtype)
    for now, before, theirs, weight in zip(log_p, old, log_q, weights, strict=True):
        # The clips are the defaults of DivergenceOptions.
        total = total + _clipped(now, before, -weight * (before - theirs), POLICY_OF_CANDIDATES)
    return total


POLICY_OF_CANDIDATES = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None}
