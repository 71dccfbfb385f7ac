"""Every objective, from hidden states to loss and gradients, against the same written out in float64.

Tolerance: 1e-9, in float64; what is left is the order of the sums.
"""

from __future__ import annotations

from dataclasses import replace

import brute_force
import pytest
import torch
from brute_force import PADDED, TOKENS, VOCABULARY, Case, problem
from objective_cases import objective_of, settings_of, values_and_gradients

from slime_opd.head.objective_head import ObjectiveHead
from slime_opd.head.output_layer import chunked_objective
from slime_opd.head.teacher_comparison import TeacherStates
from slime_opd.head.vocabulary import VocabularyShard
from slime_opd.objective.tokens import TokenColumns

CASES = {case.name: case for case in brute_force.cases()}
# One of each kind, for the properties that do not depend on every option.
SOME = [
    "penalty at another temperature", "penalty refreshed", "reverse_kl full", "forward_kl full", "jsd full, temperatures",
    "reverse_kl union tail", "jsd only_stu tail", "forward_kl only_tch remote", "reverse_kl union-intersection remote",
    "token_reward intersection student_p", "token_reward union later",
]  # fmt: skip


def leaves(given):
    return given["hidden"].clone().requires_grad_(), given["weight"].clone().requires_grad_()


def ours(case: Case, given, **options):
    hidden, weight = leaves(given)
    return values_and_gradients(objective_of(case, given, hidden, weight, **options), hidden, weight)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_brute_force(name):
    case = CASES[name]
    given = problem(case)
    hidden, weight = leaves(given)
    loss = brute_force.loss_of(case, given, hidden, weight)
    expected = [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]
    for got, wanted in zip(ours(case, given), expected, strict=True):
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in SOME if name != "token_reward intersection student_p"])
def test_gradcheck(name):
    # The clips and top-k sets are constant around the point, so the loss is smooth there. What is detached, as the
    # rewards of the first step are, is no part of the gradient; of a later step they are columns.
    case = replace(CASES[name], penalty=None)
    given = problem(case)
    frozen = given["columns"] | {"log_probs": given["columns"]["ref_log_probs"].nan_to_num(-3.0)}
    given = given | {"columns": frozen}
    hidden, weight = leaves(given)
    # fast_mode: the derivative in a random direction of all inputs, in place of one for each of the 252.
    loss = lambda h, w: Once.apply(h, w, case, given)  # noqa: E731
    assert torch.autograd.gradcheck(loss, (hidden, weight), atol=1e-7, fast_mode=True)


class Once(torch.autograd.Function):
    """The pass gives its gradients once, to save their memory; gradcheck asks twice."""

    @staticmethod
    def forward(ctx, hidden, weight, case, given):
        with torch.enable_grad():
            hidden, weight = (one.detach().requires_grad_() for one in (hidden, weight))
            loss, *gradients = values_and_gradients(objective_of(case, given, hidden, weight), hidden, weight)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        return *(grad_loss * gradient for gradient in ctx.saved_tensors), None, None


@pytest.mark.parametrize("chunk_size", [1, 3, 64])
@pytest.mark.parametrize("name", SOME)
def test_no_chunk_size_changes_anything(name, chunk_size):
    case = CASES[name]
    given = problem(case)
    for got, expected in zip(ours(case, given, chunk_size=chunk_size), ours(case, given), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SOME)
def test_micro_batches_and_the_order_of_tokens_change_nothing(name):
    case = CASES[name]
    given = problem(case)
    hidden, weight = leaves(given)
    whole = objective_of(case, given, hidden, weight)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(2))
    mixed = {key: value[order] for key, value in given.items() if key in ("hidden", "teacher_hidden", "targets")}
    mixed = given | mixed | {"columns": {key: value[order] for key, value in given["columns"].items()}}
    moved = mixed["hidden"].clone().requires_grad_()
    parts = [objective_of(case, mixed, moved, weight, rows=rows) for rows in (slice(0, 1), slice(1, 7), slice(7, None))]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(sum(part.loss for part in parts), (moved, weight))
    expected = torch.autograd.grad(whole.loss, (hidden, weight))
    torch.testing.assert_close(gradients[0], expected[0][order], rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients[1], expected[1], rtol=0, atol=1e-12)
    for metric, pair in whole.means.items():
        for i in (0, 1):
            total = sum(part.means[metric][i] for part in parts)
            torch.testing.assert_close(total, pair[i], rtol=0, atol=1e-9, msg=metric)
    for metric, bins in whole.histograms.items():
        torch.testing.assert_close(sum(part.histograms[metric] for part in parts), bins, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SOME)
def test_padding_of_the_vocabulary_changes_nothing_and_learns_nothing(name):
    case = CASES[name]
    given = problem(case)
    expected = ours(case, given)
    huge = {
        key: torch.cat([given[key][:VOCABULARY], torch.full((19, 6), 50.0)]) for key in ("weight", "teacher_weight")
    }
    got = ours(case, given | huge)
    for one, other in zip(got[:2], expected[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    torch.testing.assert_close(got[2][:VOCABULARY], expected[2][:VOCABULARY], rtol=0, atol=1e-12)
    assert got[2][VOCABULARY:].abs().max() == 0
    assert PADDED > VOCABULARY and expected[2][VOCABULARY:].abs().max() == 0


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.divergence and not case.later_step])
def test_a_teacher_that_is_the_student_teaches_nothing(name):
    case = replace(
        CASES[name], penalty=None, policy=brute_force.POLICY | {"entropy_coefficient": 0.0, "kl_coefficient": None}
    )
    given = problem(case)
    same = given | {"teacher_hidden": given["hidden"], "teacher_weight": given["weight"]}
    log_p = torch.log_softmax((given["hidden"] @ given["weight"].T)[:, :VOCABULARY], dim=1)
    columns = {k: v for k, v in given["columns"].items() if k != "advantages"}
    columns["advantages"] = torch.zeros(TOKENS, dtype=torch.float64)
    if case.remote:
        top = log_p.topk(brute_force.K)
        for key in ("student_top_ids", "teacher_top_ids"):
            columns |= {key: top.indices.int()} if key in columns else {}
        for key in ("teacher_on_student_log_probs", "teacher_top_log_probs"):
            columns |= {key: top.values} if key in columns else {}
    loss, *gradients = ours(case, same | {"columns": columns})
    assert abs(loss) < 1e-12
    # A truncated KL is the one that is not at rest where the models agree: it has no place for the rest of the mass.
    if case.divergence.get("remainder") != "truncated" or case.divergence["kind"] == "jsd":
        assert max(gradient.abs().max() for gradient in gradients) < 1e-12
    elif case.divergence["strategy"] != "union-intersection":  # which is empty here
        assert max(gradient.abs().max() for gradient in gradients) > 1e-4


def test_a_failed_response_leaves_no_trace():
    case = CASES["reverse_kl union remote"]
    given = problem(case)
    hidden, weight = leaves(given)
    objective = objective_of(case, given, hidden, weight)
    names = ("opd/divergence", "opd/distribution_reverse_kl", "opd/overlap_ratio", "opd/reverse_kl")
    # Ten tokens, one masked, two without scores.
    assert {name: objective.means[name][1].item() for name in names} == dict.fromkeys(names, 7.0)
    assert all(torch.isfinite(torch.stack(pair)).all() for pair in objective.means.values())


def test_log_probs_of_a_server_may_be_half_precision():
    case = CASES["reverse_kl union remote"]
    given = problem(case)
    wire = {
        k: v.half() if k in ("teacher_top_log_probs", "teacher_on_student_log_probs") else v
        for k, v in given["columns"].items()
    }
    got, expected = ours(case, given | {"columns": wire}), ours(case, given)
    torch.testing.assert_close(got[0], expected[0], rtol=5e-3, atol=0)
    assert got[0].dtype == torch.float64


def test_a_smaller_vocabulary_of_the_teacher_is_that_of_both():
    case = replace(CASES["jsd full, temperatures"], penalty=None)
    given = problem(case)
    shared = 20
    columns = given["columns"] | {"policy_weights": torch.zeros(TOKENS, dtype=torch.float64)}
    hidden, weight = leaves(given)
    head = ObjectiveHead(
        settings_of(case), VocabularyShard(0, VOCABULARY), given["targets"], TokenColumns.from_mapping(columns),
        TeacherStates(given["teacher_hidden"], given["teacher_weight"]), VocabularyShard(0, shared),
    )  # fmt: skip
    objective = chunked_objective(hidden, weight, VocabularyShard(0, VOCABULARY), head, 4)
    cut = given | {key: given[key][:shared] for key in ("teacher_weight",)} | {"columns": columns}
    cut["targets"] = given["targets"].clamp(max=shared - 1)
    small = given["weight"][:shared].clone().requires_grad_()
    log_p = torch.log_softmax(hidden @ small.T / case.teacher_temperature, dim=1)
    log_q = torch.log_softmax(given["teacher_hidden"] @ cut["teacher_weight"].T / case.teacher_temperature, dim=1)
    of_tokens = torch.stack([
        brute_force._between(log_p[t].exp(), log_q[t].exp(), "jsd", case.divergence["beta"]) for t in range(TOKENS)
    ])  # fmt: skip
    expected = (
        case.divergence["coefficient"] * (columns["divergence_base"] * columns["divergence_weights"] * of_tokens).sum()
    )
    torch.testing.assert_close(objective.loss, expected.detach(), rtol=0, atol=1e-9)
    gradient = torch.autograd.grad(objective.loss, weight)[0]
    torch.testing.assert_close(gradient[:shared], torch.autograd.grad(expected, small)[0], rtol=0, atol=1e-9)
    assert gradient[shared:].abs().max() == 0
    unknown = given["targets"] >= shared
    assert objective.means["opd/reverse_kl"][1] == 0 and unknown.any()
