"""Generate functions: rows of spans become samples, and a function of two turns serves training and evaluation."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from rollout_fakes import EOS, FakeClient, FakeTeacher, FirstLetterReward, LetterTokenizer, config, generation, prompts

from slime_opd.errors import DataError
from slime_opd.rollout.evaluate import EvalSet, evaluate
from slime_opd.rollout.generate import Generator
from slime_opd.rollout.generation import Row, Span, make_sample, sampling_seed
from slime_opd.types import Prompt, Status

TOOL_ANSWER = (9, 9)


async def two_turns(prompt, context):
    """A turn of the student, an answer of a tool, and a second turn."""
    first = await context.complete(prompt.tokens, stop=("</tool>",))
    spans = (*first.spans, Span(TOOL_ANSWER, is_trained=False))
    so_far = (*prompt.tokens, *Row(spans, first.status).token_ids)
    second = await context.complete(so_far)
    return [Row((*spans, *second.spans), second.status)]


def generate(function, client, *, teacher=None, **options):
    async def run():
        generator = Generator(
            client, LetterTokenizer(), config(**options), reward=None, teacher=teacher, generate=function
        )
        return await generator.generate(prompts(1))

    [group] = asyncio.run(run())
    return group.samples


def test_a_function_of_two_turns_trains_the_students_tokens_and_not_the_tools():
    client, teacher = FakeClient([generation([2, 3]), generation([4, EOS])].__getitem__), FakeTeacher()
    [sample] = generate(two_turns, client, teacher=teacher)
    assert sample.response_tokens == (2, 3, *TOOL_ANSWER, 4, EOS)
    assert (sample.response, sample.status) == ("bciid", Status.COMPLETED)
    assert sample.values["loss_mask"].tolist() == [1, 1, 0, 0, 1, 1]
    np.testing.assert_array_equal(sample.values["rollout_log_probs"], np.float32([-1, -2, np.nan, np.nan, -1, -2]))
    assert teacher.requests == [sample]
    assert [tokens for tokens, _ in client.requests] == [(1, 2), (1, 2, 2, 3, *TOOL_ANSWER)]


def test_each_turn_has_its_own_stops_seed_and_the_rest_of_the_length_limit():
    client = FakeClient([generation([2, 3]), generation([4], "length")].__getitem__)
    [sample] = generate(two_turns, client, rollout_stop=("x",))
    first, second = (params for _, params in client.requests)
    assert (first.stop, second.stop) == (("x", "</tool>"), ("x",))
    assert (first.max_new_tokens, second.max_new_tokens) == (8, 4)
    assert first.seed == sampling_seed(5, "rollout", 0, 0) != second.seed == sampling_seed(5, "rollout", 0, 0, turn=1)
    assert sample.status is Status.TRUNCATED


@pytest.mark.parametrize("limits", [{"rollout_max_response_len": 4}, {"rollout_max_context_len": 6}])
def test_a_turn_for_which_no_token_is_left_is_truncated_without_a_request(limits):
    client = FakeClient(lambda _: generation([2, 3]))
    [sample] = generate(two_turns, client, **limits)
    assert sample.response_tokens == (2, 3, *TOOL_ANSWER)
    assert sample.status is Status.TRUNCATED
    assert len(client.requests) == 1


def test_evaluation_calls_the_same_function_and_tells_it_so():
    seen = []

    async def function(prompt, context):
        seen.append((context.is_evaluation, context.sample_index))
        return await two_turns(prompt, context)

    client = FakeClient(lambda number: generation([[2, 3], [4, EOS]][number % 2]))
    sets = [EvalSet("one", prompts(1))]
    metrics = asyncio.run(evaluate(client, LetterTokenizer(), config(), sets, FirstLetterReward(), generate=function))
    assert seen == [(True, 0)]
    assert (metrics["eval/one/accuracy"].total, metrics["eval/one/response_length"].total) == (1, 6)
    generate(function, FakeClient(lambda number: generation([[2], [EOS]][number % 2])), n_samples_per_prompt=2)
    assert sorted(seen[1:]) == [(False, 0), (False, 1)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "returned 0 rows for prompt 0, expected 1"),
        ([Row((), Status.COMPLETED)] * 2, "returned 2 rows for prompt 0, expected 1"),
        (
            [Row((Span((2,) * 5), Span((3,) * 4, is_trained=False)), Status.COMPLETED)],
            r"returned 9 response tokens for prompt 0, expected at most 8",
        ),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused(rows, message):
    async def function(prompt, context):
        return rows

    with pytest.raises(DataError, match=message):
        generate(function, FakeClient(lambda _: generation([2])))


@pytest.mark.parametrize("arrays", [{"log_probs": np.zeros(1)}, {"top_ids": np.zeros((3, 2), np.int32)}])
def test_a_span_whose_arrays_are_of_another_length_is_refused(arrays):
    with pytest.raises(DataError, match=r"a generated span has 2 tokens and [13] "):
        Span((4, 5), **arrays)


PROMPT = Prompt(7, (1,), "p")


def values_of(*spans: Span) -> dict[str, list]:
    values = make_sample(PROMPT, Row(spans, Status.COMPLETED), "").values
    return {
        name: values[name].tolist() for name in ("loss_mask", "rollout_log_probs", "student_top_ids") if name in values
    }


def test_tokens_that_the_student_did_not_sample_have_no_log_probs():
    assert values_of(Span((4, 5))) == {"loss_mask": [1, 1]}
    assert values_of() == {"loss_mask": []}


def test_top_ids_of_all_trained_spans_are_kept_and_those_of_some_are_not():
    top_ids = np.int32([[4, 6]])
    assert values_of(Span((4,), top_ids=top_ids), Span((9,), is_trained=False)) == {
        "loss_mask": [1, 0],
        "student_top_ids": [[4, 6], [0, 0]],
    }
    assert values_of(Span((4,), top_ids=top_ids), Span((5,))) == {"loss_mask": [1, 1]}
    assert values_of(Span((9,), is_trained=False)) == {"loss_mask": [0]}


def test_an_empty_response_keeps_its_empty_fields():
    span = Span((), np.zeros(0, np.float32), top_ids=np.zeros((0, 2), np.int32))
    assert values_of(span) == {"loss_mask": [], "rollout_log_probs": [], "student_top_ids": []}
