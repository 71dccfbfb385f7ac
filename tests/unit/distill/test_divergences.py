"""Divergences over candidate sets against loops over the whole vocabulary, and where their gradients vanish."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slime_opd.distill.candidates import STRATEGIES, candidates
from slime_opd.distill.divergences import REMAINDERS, distribution, divergence, log_rest
from slime_opd.schedule import KINDS

INF = float("inf")


def log_softmaxes(rows: int, vocabulary: int, *, seed: int, scale: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    """A student and a teacher that resemble each other, float64 [rows, vocabulary]."""
    generator = torch.Generator().manual_seed(seed)
    teacher = scale * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
    student = teacher + torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
    return student.log_softmax(dim=1), teacher.log_softmax(dim=1)


def by_hand(p: list[float], q: list[float], kind: str, beta: float = 0.5) -> float:
    """A divergence term by term, with 0 log 0 = 0."""

    def mean_log_ratio(of: list[float], over: list[float]) -> float:
        return sum(one * math.log(one / other) for one, other in zip(of, over, strict=True) if one > 0)

    if kind == "reverse_kl":
        return mean_log_ratio(p, q)
    if kind == "forward_kl":
        return mean_log_ratio(q, p)
    m = [beta * b + (1 - beta) * a for a, b in zip(p, q, strict=True)]
    return beta * mean_log_ratio(q, m) + (1 - beta) * mean_log_ratio(p, m)


def set_by_hand(student: list[int], teacher: list[int], strategy: str) -> list[int]:
    """The candidates as Python sets have them."""
    of_student, of_teacher = set(student), set(teacher)
    return sorted({
        "only_stu": of_student,
        "only_tch": of_teacher,
        "intersection": of_student & of_teacher,
        "union": of_student | of_teacher,
        "union-intersection": of_student ^ of_teacher,
    }[strategy])  # fmt: skip


def remainder_by_hand(of_all: list[float], ids: list[int], remainder: str) -> list[float]:
    """The distribution over a set of ids: a loop over the vocabulary."""
    inside = [of_all[i] for i in ids]
    if remainder == "tail":
        return [*inside, sum(value for i, value in enumerate(of_all) if i not in ids)]
    if remainder == "renormalized":
        return [value / sum(inside) for value in inside]
    return inside


def over_set(log_p, log_q, ids, valid, remainder):
    """Both models over a set of candidates, from their log-probs on the whole vocabulary [R, V]."""
    inside = torch.zeros(log_p.shape, dtype=torch.int64).scatter_add_(1, ids, valid.long()) > 0
    p_rest, q_rest = (log.masked_fill(inside, -INF).logsumexp(dim=1) for log in (log_p, log_q))
    return distribution(log_p.gather(1, ids), log_q.gather(1, ids), valid, p_rest, q_rest, remainder=remainder)


@pytest.mark.parametrize("remainder", REMAINDERS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_divergence_over_candidates_is_the_loop_over_the_vocabulary(kind, strategy, remainder):
    k, beta = 5, 0.3
    log_p, log_q = log_softmaxes(40, 23, seed=0)
    tops = log_p.topk(k).indices, log_q.topk(k).indices
    ids, valid = candidates(*tops, strategy)
    got = divergence(*over_set(log_p, log_q, ids, valid, remainder), kind=kind, beta=beta)
    empty = 0
    for row in range(len(log_p)):
        chosen = set_by_hand(tops[0][row].tolist(), tops[1][row].tolist(), strategy)
        empty += not chosen
        p, q = (remainder_by_hand(log[row].exp().tolist(), chosen, remainder) for log in (log_p, log_q))
        assert got[row].item() == pytest.approx(by_hand(p, q, kind, beta), abs=1e-9)
    assert empty < 5  # the sets are there, whatever the strategy


@pytest.mark.parametrize("kind", KINDS)
def test_over_the_whole_vocabulary_every_remainder_is_the_divergence_itself(kind):
    log_p, log_q = log_softmaxes(6, 11, seed=1)
    ids = torch.arange(11).expand(6, 11)
    full = divergence(log_p, log_q, kind=kind)
    for row in range(6):
        assert full[row].item() == pytest.approx(by_hand(log_p[row].exp().tolist(), log_q[row].exp().tolist(), kind))
    for remainder in REMAINDERS:
        pair = over_set(log_p, log_q, ids, torch.ones_like(ids, dtype=torch.bool), remainder)
        torch.testing.assert_close(divergence(*pair, kind=kind), full, rtol=0, atol=1e-12)


# p = (1/2, 1/2), q = (1/4, 3/4), m = (3/8, 5/8).
@pytest.mark.parametrize(("kind", "value"), [
    ("reverse_kl", 0.5 * math.log(4 / 3)),
    ("forward_kl", 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)),
    ("jsd", 0.5 * (0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5)) + 0.5 * (0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5))),
])  # fmt: skip
def test_two_tokens_by_hand(kind, value):
    p, q = torch.tensor([0.5, 0.5]).double(), torch.tensor([0.25, 0.75]).double()
    assert divergence(p.log(), q.log(), kind=kind).item() == pytest.approx(value, abs=1e-12)
    # The same pair as one candidate and a tail.
    valid = torch.tensor([[True]])
    pair = distribution(
        p[None, :1].log(), q[None, :1].log(), valid, p[1:].log(), q[1:].log(), remainder="tail"
    )  # fmt: skip
    assert divergence(*pair, kind=kind).item() == pytest.approx(value, abs=1e-12)


def test_one_candidate_without_its_tail_by_hand():
    log_p, log_q = torch.tensor([[0.5]]).log(), torch.tensor([[0.25]]).log()
    rests = torch.tensor([0.5]).log(), torch.tensor([0.75]).log()
    valid = torch.tensor([[True]])
    truncated = distribution(log_p, log_q, valid, *rests, remainder="truncated")
    assert divergence(*truncated, kind="reverse_kl").item() == pytest.approx(0.5 * math.log(2))
    assert divergence(*truncated, kind="forward_kl").item() == pytest.approx(-0.25 * math.log(2))
    renormalized = distribution(log_p, log_q, valid, *rests, remainder="renormalized")
    assert divergence(*renormalized, kind="reverse_kl").item() == 0.0


def test_the_jsd_s_beta_weighs_the_teacher():
    log_p, log_q = log_softmaxes(5, 9, seed=2)
    for beta, kind, scale in ((1e-5, "forward_kl", 1e-5), (1 - 1e-5, "reverse_kl", 1e-5)):
        got = divergence(log_p, log_q, kind="jsd", beta=beta) / scale
        torch.testing.assert_close(got, divergence(log_p, log_q, kind=kind), rtol=1e-3, atol=1e-4)


@given(st.integers(0, 10_000), st.sampled_from(KINDS), st.sampled_from(STRATEGIES))
def test_a_coarser_view_shows_no_more_divergence_and_never_less_than_none(seed, kind, strategy):
    log_p, log_q = log_softmaxes(3, 12, seed=seed, scale=3.0)
    ids, valid = candidates(log_p.topk(4).indices, log_q.topk(4).indices, strategy)
    coarse = divergence(*over_set(log_p, log_q, ids, valid, "tail"), kind=kind)
    assert (coarse >= -1e-12).all() and (coarse <= divergence(log_p, log_q, kind=kind) + 1e-12).all()


@pytest.mark.parametrize("remainder", REMAINDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_finite_differences(kind, remainder):
    log_p, log_q = log_softmaxes(4, 10, seed=3)
    ids, valid = candidates(log_p.topk(3).indices, log_q.topk(3).indices, "union")
    assert not valid.all()

    def of_logits(logits):
        return divergence(*over_set(logits.log_softmax(dim=1), log_q, ids, valid, remainder), kind=kind, beta=0.3)

    assert torch.autograd.gradcheck(of_logits, (log_p.clone().requires_grad_(),))


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_takes_no_gradient(kind):
    log_p, log_q = (log.clone().requires_grad_() for log in log_softmaxes(2, 5, seed=4))
    divergence(log_p, log_q, kind=kind).sum().backward()
    assert log_p.grad.abs().sum() > 0 and log_q.grad is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("low", [-INF, -1e30])
def test_an_entry_that_neither_has_is_not_there(kind, low):
    log_p, log_q = log_softmaxes(3, 5, seed=5)
    nothing = torch.full((3, 2), low, dtype=torch.float64)
    padded = torch.cat([log_p, nothing], dim=1).requires_grad_()
    got = divergence(padded, torch.cat([log_q, nothing], dim=1), kind=kind)
    got.sum().backward()
    bare = log_p.clone().requires_grad_()
    expected = divergence(bare, log_q, kind=kind)
    expected.sum().backward()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-15)
    assert torch.equal(padded.grad[:, 5:], torch.zeros(3, 2, dtype=torch.float64))
    torch.testing.assert_close(padded.grad[:, :5], bare.grad, rtol=0, atol=1e-15)


def test_a_token_that_the_teacher_rules_out_makes_the_reverse_kl_infinite():
    log_p, log_q = torch.tensor([0.5, 0.5]).log().requires_grad_(), torch.tensor([1.0, 0.0]).log()
    assert divergence(log_p, log_q, kind="reverse_kl").item() == INF
    assert divergence(log_p, log_q, kind="forward_kl").item() == pytest.approx(math.log(2))
    jsd = divergence(log_p, log_q, kind="jsd")
    assert jsd.item() == pytest.approx(by_hand([0.5, 0.5], [1.0, 0.0], "jsd"))
    assert torch.autograd.grad(jsd, log_p)[0].isfinite().all()


def test_a_token_that_the_student_rules_out_makes_the_forward_kl_infinite():
    log_p, log_q = torch.tensor([1.0, 0.0]).log().requires_grad_(), torch.tensor([0.5, 0.5]).log()
    assert divergence(log_p, log_q, kind="forward_kl").item() == INF
    for kind in ("reverse_kl", "jsd"):
        got = divergence(log_p, log_q, kind=kind)
        assert got.item() == pytest.approx(by_hand([1.0, 0.0], [0.5, 0.5], kind))
        assert torch.autograd.grad(got, log_p)[0].isfinite().all()


@pytest.mark.parametrize("held", [INF, -INF, float("nan"), 3.0])
@pytest.mark.parametrize("remainder", REMAINDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_an_invalid_entry_holds_does_not_matter(kind, remainder, held):
    log_p, log_q = log_softmaxes(2, 4, seed=6)
    valid = torch.tensor([[True, False, True], [False, True, True]])
    rests = log_p[:, 3], log_q[:, 3]
    spoilt_p, spoilt_q = (log[:, :3].masked_fill(~valid, held).requires_grad_() for log in (log_p, log_q))
    got = divergence(*distribution(spoilt_p, spoilt_q, valid, *rests, remainder=remainder), kind=kind)
    clean = divergence(*distribution(log_p[:, :3], log_q[:, :3], valid, *rests, remainder=remainder), kind=kind)
    assert torch.equal(got, clean)
    (gradient,) = torch.autograd.grad(got.sum(), spoilt_p)
    assert torch.equal(gradient[~valid], torch.zeros(2, dtype=torch.float64)) and gradient.isfinite().all()


@pytest.mark.parametrize("remainder", REMAINDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_set_has_neither_divergence_nor_gradient(kind, remainder):
    log_p, log_q = (log.clone().requires_grad_() for log in log_softmaxes(2, 3, seed=7))
    rest = torch.zeros(2, dtype=torch.float64, requires_grad=True)  # all mass is outside
    pair = distribution(log_p, log_q, torch.zeros(2, 3, dtype=torch.bool), rest, rest.detach(), remainder=remainder)
    assert all((log[:, :3] < -1e20).all() for log in pair)  # no entry comes into being
    got = divergence(*pair, kind=kind)
    assert got.tolist() == [0.0, 0.0]
    (gradient,) = torch.autograd.grad(got.sum(), log_p)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_a_misnamed_divergence_or_remainder_says_what_there_is():
    one = torch.zeros(1, 1)
    with pytest.raises(ValueError, match=r"'kl'.*reverse_kl, forward_kl, jsd"):
        divergence(one, one, kind="kl")
    with pytest.raises(ValueError, match=r"'rest'.*tail, truncated, renormalized"):
        distribution(one, one, one > -1, one[0], one[0], remainder="rest")


def test_the_rest_is_what_the_valid_entries_leave():
    log_q = torch.tensor([[0.5, 0.3, 0.1], [0.5, 0.3, 0.1]]).log()
    valid = torch.tensor([[True, True, True], [True, False, True]])
    torch.testing.assert_close(log_rest(log_q, valid), torch.tensor([0.1, 0.4]).log())
    assert log_rest(log_q, valid).dtype == torch.float32
    assert log_rest(log_q, torch.zeros_like(valid)).tolist() == [0.0, 0.0]
    assert log_rest(log_q.masked_fill(~valid, float("nan")), valid).isfinite().all()


def test_the_rest_has_a_floor():
    # As float32 on a wire, log-probs may add up to 1 or a little more.
    full, over = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.75, 0.250001]]).log()
    for log_q in (full, over):
        assert log_rest(log_q, torch.ones(1, 2, dtype=torch.bool)).item() == pytest.approx(math.log(1e-7), rel=1e-6)
    # Above the floor the sum is not lost to float32: 1 − 2e-6 in a thousand parts.
    many = torch.full((1, 1000), math.log((1 - 2e-6) / 1000), dtype=torch.float64)
    got = log_rest(many, torch.ones(1, 1000, dtype=torch.bool))
    assert got.exp().item() == pytest.approx(2e-6, rel=1e-6)


@pytest.mark.parametrize("strategy", ["only_stu", "only_tch", "union"])
@pytest.mark.parametrize("kind", KINDS)
def test_with_a_tail_the_gradient_vanishes_where_the_models_agree(kind, strategy):
    assert gradient_where_equal(kind, strategy, "tail").abs().max() < 1e-15
    assert gradient_where_equal(kind, strategy, "renormalized").abs().max() < 1e-15


@pytest.mark.parametrize(("kind", "sign"), [("reverse_kl", 1.0), ("forward_kl", -1.0)])
def test_truncated_it_moves_mass_out_of_the_set_or_into_it_where_the_models_agree(kind, sign):
    log_q, k = log_softmaxes(5, 30, seed=8)[1], 4
    got = gradient_where_equal(kind, "only_stu", "truncated")
    # ± the gradient of the set's mass M: ± p_j ([j in the set] − M).
    q = log_q.exp()
    inside = torch.zeros_like(q).scatter_(1, q.topk(k).indices, 1.0)
    mass = (q * inside).sum(dim=1, keepdim=True)
    torch.testing.assert_close(got, sign * q * (inside - mass), rtol=0, atol=1e-12)
    assert (got.norm(dim=1) > 0.02).all()


def gradient_where_equal(kind: str, strategy: str, remainder: str) -> torch.Tensor:
    log_q = log_softmaxes(5, 30, seed=8)[1]
    logits = log_q.clone().requires_grad_()
    log_p = logits.log_softmax(dim=1)
    ids, valid = candidates(log_p.topk(4).indices, log_q.topk(4).indices, strategy)
    return torch.autograd.grad(divergence(*over_set(log_p, log_q, ids, valid, remainder), kind=kind).sum(), logits)[0]


@pytest.mark.parametrize(("kind", "strategy"), [
    ("reverse_kl", "only_stu"),
    ("reverse_kl", "only_tch"),
    ("forward_kl", "only_tch"),
])  # fmt: skip
def test_a_tail_points_closer_to_the_whole_vocabulary_s_gradient_and_truncation_pulls_at_equality(kind, strategy):
    # A teacher whose 16 most likely tokens hold 63 % of its mass, and a student nearby.
    generator, k = torch.Generator().manual_seed(0), 16
    teacher = 2.9 * torch.randn(100, 2048, generator=generator, dtype=torch.float64)
    student = teacher + 0.95 * torch.randn(100, 2048, generator=generator, dtype=torch.float64)
    log_q = teacher.log_softmax(dim=1)
    assert log_q.exp().topk(k).values.sum(dim=1).mean().item() == pytest.approx(0.637, abs=0.02)

    def gradient(logits, remainder):
        logits = logits.clone().requires_grad_()
        log_p = logits.log_softmax(dim=1)
        if remainder is None:
            return torch.autograd.grad(divergence(log_p, log_q, kind=kind).sum(), logits)[0]
        ids, valid = candidates(log_p.topk(k).indices, log_q.topk(k).indices, strategy)
        value = divergence(*over_set(log_p, log_q, ids, valid, remainder), kind=kind)
        return torch.autograd.grad(value.sum(), logits)[0]

    exact = gradient(student, None)
    cosine = {name: torch.cosine_similarity(gradient(student, name), exact, dim=1).mean().item() for name in REMAINDERS}
    at_equality = {name: (gradient(teacher, name).norm(dim=1) / exact.norm(dim=1)).mean().item() for name in REMAINDERS}
    assert cosine["tail"] > 0.84 and cosine["tail"] > cosine["renormalized"] > cosine["truncated"]
    assert cosine["tail"] > cosine["truncated"] + 0.1
    assert at_equality["tail"] < 1e-12 and at_equality["truncated"] == pytest.approx(0.6, abs=0.1)
