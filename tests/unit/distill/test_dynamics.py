"""What a student learns from its teacher, as metrics: hand-computed cases, and brute force over sets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slime_opd.distill import dynamics
from slime_opd.distill.comparison import Comparison, Overlap
from slime_opd.metrics import Concentration

NAN = float("nan")


def mean(pair) -> float:
    return (pair[0] / pair[1]).item()


def test_a_mean_counts_what_is_counted_and_not_nan():
    pair = dynamics.counted_mean(torch.tensor([1.0, 2.0, NAN, 8.0]), torch.tensor([1.0, 0.5, 1.0, 0.0]))
    assert [part.item() for part in pair] == [3.0, 2.0]
    assert pair[0].dtype == torch.float64


def test_the_sampled_log_ratio_is_split_by_position_and_by_being_right():
    kinds = dynamics.TokenKinds(
        position_third=torch.tensor([0.0, 0.0, 1.0, 2.0, 2.0]), correct=torch.tensor([1.0, 1.0, 1.0, 0.0, NAN])
    )
    signal, teacher = torch.tensor([1.0, 3.0, NAN, 5.0, 7.0]), torch.tensor([-1.0, -2.0, NAN, -3.0, -4.0])
    found = dynamics.sampled(signal, teacher, torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]), kinds)
    assert mean(found["opd/reverse_kl"]) == 3.0
    assert mean(found["opd/teacher_log_probs"]) == -2.0
    assert mean(found["opd/reverse_kl/early"]) == 2.0 and mean(found["opd/reverse_kl/late"]) == 5.0
    assert found["opd/reverse_kl/middle"][1] == 0
    assert mean(found["opd/reverse_kl/right"]) == 2.0 and mean(found["opd/reverse_kl/wrong"]) == 5.0
    assert set(dynamics.sampled(signal, teacher, torch.ones(5), dynamics.TokenKinds(None, None))) == {
        "opd/reverse_kl",
        "opd/teacher_log_probs",
    }


def overlap_of(log_p: torch.Tensor, log_q: torch.Tensor, k: int) -> Overlap:
    ids, student = log_q.topk(k).indices, log_p.topk(k)
    shared = (ids[:, :, None] == student.indices[:, None, :]).any(2)
    return Overlap(shared, log_p.gather(1, ids), log_q.gather(1, ids), student.values.exp().sum(1))


def comparison_of(log_p: torch.Tensor, log_q: torch.Tensor, k: int, scored: torch.Tensor) -> Comparison:
    zeros = torch.zeros(len(log_p), dtype=log_p.dtype)
    entropies = -(log_q.exp() * log_q).sum(1)
    return Comparison(
        scored, zeros, zeros, full=zeros, teacher_entropies=entropies, overlap=overlap_of(log_p, log_q, k)
    )


@given(st.integers(0, 1000))
def test_overlap_metrics_are_those_of_the_sets(seed):
    random = np.random.default_rng(seed)
    tokens, vocabulary, k = 6, 12, 4
    log_p, log_q = (torch.from_numpy(random.normal(size=(tokens, vocabulary)) * 2).log_softmax(1) for _ in range(2))
    scored = torch.tensor([1.0, 0.0, 0.3, 1.0, 1.0, 1.0], dtype=torch.float64)
    student_entropy = -(log_p.exp() * log_p).sum(1)
    found = dynamics.compared(
        comparison_of(log_p, log_q, k, scored),
        student_entropy,
        student_entropy,
        scored,
        dynamics.TokenKinds(None, None),
    )
    ratios, of_student, of_teacher, advantages, gaps = [], [], [], [], []
    for t in range(tokens):
        if scored[t] == 0:
            continue
        top_p, top_q = set(log_p[t].topk(k).indices.tolist()), set(log_q[t].topk(k).indices.tolist())
        both = sorted(top_p & top_q)
        p, q = log_p[t].exp(), log_q[t].exp()
        ratios.append(len(both) / k)
        gaps.append((student_entropy[t] + (q * log_q[t]).sum()).item())
        if both:
            of_student.append(p[both].sum().item())
            of_teacher.append(q[both].sum().item())
        mass = p[sorted(top_p)].sum()
        advantages += [((log_q[t, v] - log_p[t, v]) * p[v] / mass).item() for v in both]
    assert mean(found["opd/overlap_ratio"]) == pytest.approx(np.mean(ratios))
    assert mean(found["opd/entropy_gap"]) == pytest.approx(np.mean(gaps))
    for name, values in (
        ("opd/student_mass_on_overlap", of_student),
        ("opd/teacher_mass_on_overlap", of_teacher),
        ("opd/overlap_advantage", advantages),
    ):
        assert found[name][1].item() == len(values)
        assert found[name][0].item() == pytest.approx(sum(values), abs=1e-12)


def exact_share(values: np.ndarray) -> float:
    """The smallest share of values that carries 80% of their sum."""
    ordered = np.sort(values)[::-1]
    return (np.searchsorted(np.cumsum(ordered), 0.8 * ordered.sum()) + 1) / len(values)


@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0])
def test_the_share_of_tokens_that_carries_80_percent_is_the_sorted_one(spread):
    values = np.exp(np.random.default_rng(0).normal(size=20_000) * spread)
    tensor = torch.from_numpy(values)
    parts = [dynamics.histogram(part, torch.ones(len(part))) for part in tensor.split(7_000)]
    shares = [Concentration(*map(tuple, part.tolist())) for part in parts]
    found = shares[0].merge(shares[1]).merge(shares[2])
    assert sum(found.counts) == len(values) and sum(found.sums) == pytest.approx(values.sum())
    # A bin is 15 percent wide.
    assert found.value == pytest.approx(exact_share(values), rel=0.02)


def test_what_is_not_above_zero_carries_nothing_and_is_counted():
    bins = dynamics.histogram(torch.tensor([-1.0, 0.0, 3.0, 3.0, NAN, 9.0]), torch.tensor([1.0] * 5 + [0.0]))
    share = Concentration(*map(tuple, bins.tolist()))
    assert sum(share.counts) == 4 and sum(share.sums) == 6.0
    assert share.value == pytest.approx(0.8 * 2 / 4)
    assert Concentration((3.0, 0.0), (0.0, 0.0)).value is None and Concentration((), ()).value is None


@pytest.mark.parametrize("value", [1e-30, 1e-8, 1e3, 1e30])
def test_a_divergence_of_any_size_has_a_bin(value):
    bins = dynamics.histogram(torch.tensor([value], dtype=torch.float64), torch.ones(1))
    assert bins.shape == (2, dynamics.BINS) and bins[0].sum() == 1
    assert math.isclose(bins[1].sum().item(), value)
