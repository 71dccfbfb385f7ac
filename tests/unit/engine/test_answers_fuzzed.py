"""Whatever a server answers, the client has scores or an EngineError, and a teacher has scores or a counted failure."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
from collections.abc import Callable

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slime_opd.engine import protocol
from slime_opd.engine.client import EngineClient
from slime_opd.engine.protocol import SamplingParams
from slime_opd.engine.top_k import TopK, parse_rows
from slime_opd.errors import EngineError
from slime_opd.teacher.sglang import ScoreRequest, SGLangTeacher
from slime_opd.types import Prompt, Sample, Status

TOKENS, START, K, SIZE = (4, 5, 7, 8, 9), 2, 2, 32
TRUE_ROWS = [[None, 5, None], [-1.0, 7, None], [-2.0, 8, None], [-0.5, 9, None]]
TRUE_TOP = [None, *[[[-0.4, 1, None], [-1.5, 2, None]]] * 3]


def bodies(body: bytes, *calls: Callable) -> list:
    """What each call on a server that answers `body` to everything gives: a result or its EngineError."""

    async def outcome(client: EngineClient, call: Callable):
        try:
            return await call(client)
        except EngineError as error:
            return error

    async def main() -> list:
        client = EngineClient(
            "http://t:1", concurrency=2, timeout_s=5, retries=0, vocabulary_size=SIZE,
            transport=httpx.MockTransport(lambda request: httpx.Response(200, content=body)),
        )  # fmt: skip
        try:
            return [await outcome(client, call) for call in calls]
        finally:
            await client.aclose()

    return asyncio.run(main())


NOTHING = TopK(np.empty((3, 0), np.int32), np.empty((3, 0), np.float32))
CALLS = (
    lambda client: client.score(TOKENS, START),
    lambda client: client.score_top_k(TOKENS, START, K),
    lambda client: client.score_candidates(TOKENS, START, np.int32([[1], [2], [3]]), NOTHING),
    lambda client: client.generate(TOKENS, SamplingParams(1.0, 1.0, -1, 4)),
    lambda client: client.model_info(),
)


def check_outcomes(body: bytes) -> None:
    scores, top, candidates, generation, info = bodies(body, *CALLS)
    if not isinstance(scores, EngineError):
        check_log_probs(scores, (3,))
    if not isinstance(top, EngineError):
        check_log_probs(top[0], (3,))
        check_log_probs(top[1].log_probs, (3, K))
        assert ((top[1].ids >= 0) & (top[1].ids < SIZE)).all()
    if not isinstance(candidates, EngineError):
        check_log_probs(candidates, (3, 1))
    if not isinstance(generation, EngineError):
        check_log_probs(generation.log_probs, (len(generation.token_ids),))
        assert all(type(token) is int and 0 <= token < SIZE for token in generation.token_ids)
    assert isinstance(info, EngineError | protocol.ModelInfo)


def check_log_probs(values: np.ndarray, shape: tuple[int, ...]) -> None:
    assert values.dtype == np.float32 and values.shape == shape
    assert ((values <= 0) & (values >= -1000)).all()


NUMBERS = st.one_of(
    st.integers(-(10**3), 10**3), st.integers(), st.just(10**400), st.floats(), st.floats(-50, 0), st.booleans()
)
LEAVES = st.one_of(st.none(), NUMBERS, st.text(max_size=5), st.sampled_from([5, 7, 8, 9]))
JSON = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(st.text(max_size=5), inner)),
    max_leaves=20,
)
# Nearly true answers come further: one part of them is something else.
NAMES = ("input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs", "output_token_logprobs")
ROWS = st.lists(st.one_of(JSON, st.lists(LEAVES, min_size=2, max_size=3)), max_size=5)


@st.composite
def nearly_true(draw) -> object:
    meta = json.loads(json.dumps({
        "finish_reason": {"type": "stop"}, "weight_version": "1", "input_token_logprobs": TRUE_ROWS,
        "input_top_logprobs": TRUE_TOP, "output_token_logprobs": TRUE_ROWS[1:],
        "input_token_ids_logprobs": [None, *[[[-1.0, 1, None], [-1.5, 2, None], [-2.0, 3, None]]] * 3],
    }))  # fmt: skip
    name = draw(st.sampled_from([*meta, "finish_reason"]))
    part = meta[name]
    if isinstance(part, list) and draw(st.booleans()):
        index = draw(st.integers(0, len(part) - 1))
        if isinstance(part[index], list) and draw(st.booleans()):
            part[index][draw(st.integers(0, len(part[index]) - 1))] = draw(JSON)
        else:
            part[index] = draw(JSON)
    else:
        meta[name] = draw(st.one_of(JSON, ROWS))
    return {"meta_info": meta}


@settings(max_examples=80, deadline=None)
@given(st.one_of(JSON, nearly_true(), st.lists(nearly_true(), max_size=2)))
def test_any_json_is_scores_or_an_engine_error(answer):
    check_outcomes(json.dumps(answer).encode())


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_an_engine_error_or_nothing(body):
    check_outcomes(body)


@settings(max_examples=100, deadline=None)
@given(st.one_of(JSON, ROWS, st.lists(ROWS, min_size=3, max_size=3)))
def test_any_most_likely_tokens_of_a_generation_are_rows_or_an_engine_error(rows):
    with contextlib.suppress(EngineError):
        parse_rows(rows, 3, 2)


def true_answer() -> dict:
    return json.loads(json.dumps({"meta_info": {"input_token_logprobs": TRUE_ROWS, "input_top_logprobs": TRUE_TOP}}))


def with_row(index: int, value: object, name: str = "input_token_logprobs") -> bytes:
    answer = true_answer()
    answer["meta_info"][name][index] = value
    return json.dumps(answer).encode()


def with_text(index: int, text: str) -> bytes:
    """A row as it cannot be written by json.dumps."""
    return with_row(index, "HERE").replace(b'"HERE"', text.encode())


FAULTS: dict[str, bytes] = {
    "a row is a dict": with_row(1, {"log_prob": -1.0}),
    "a row is a number": with_row(1, 5),
    "a row is null": with_row(1, None),
    "a row is a string": with_row(1, "ab"),
    "a row is too short": with_row(1, [-1.0]),
    "a row is nested": with_row(1, [[-1.0], 7, None]),
    "an id is Infinity": with_text(1, "[-1.0, Infinity, null]"),
    "an id is NaN": with_text(1, "[-1.0, NaN, null]"),
    "an id is a float": with_row(1, [-1.0, 7.0, None]),
    "an id is a string": with_row(1, [-1.0, "7", None]),
    "an id is true": with_row(1, [-1.0, True, None]),
    "an id is huge": with_row(1, [-1.0, 10**30, None]),
    "an id is negative": with_row(1, [-1.0, -7, None]),
    "an id is 0, which is not how its token is echoed": with_row(3, [-1.0, 0, None]),
    "a log-prob is a huge integer": with_row(1, [-(10**400), 7, None]),
    "a log-prob has more digits than Python reads": with_text(1, f"[-{'9' * 5000}, 7, null]"),
    "a log-prob is a string": with_row(1, ["-1.0", 7, None]),
    "a log-prob is false": with_row(1, [False, 7, None]),
    "a log-prob is null": with_row(1, [None, 7, None]),
    "a log-prob is NaN": with_text(1, "[NaN, 7, null]"),
    "a log-prob is -Infinity": with_text(1, "[-Infinity, 7, null]"),
    "a log-prob is 1e999": with_text(1, "[-1e999, 7, null]"),
    "a log-prob is positive": with_row(1, [0.25, 7, None]),
    "a log-prob is -1e30": with_row(1, [-1e30, 7, None]),
    "a log-prob is a placeholder": with_row(1, [-9999.0, 7, None]),
    "rows are missing": json.dumps({"meta_info": {}}).encode(),
    "rows are a dict": json.dumps({"meta_info": {"input_token_logprobs": {"0": TRUE_ROWS}}}).encode(),
    "rows are a string": json.dumps({"meta_info": {"input_token_logprobs": "abcd"}}).encode(),
    "a row too many": json.dumps({"meta_info": {"input_token_logprobs": [*TRUE_ROWS, TRUE_ROWS[1]]}}).encode(),
    "a row too few": json.dumps({"meta_info": {"input_token_logprobs": TRUE_ROWS[:-1]}}).encode(),
    "top-k rows are missing": json.dumps({"meta_info": {"input_token_logprobs": TRUE_ROWS}}).encode(),
    "a top-k row too few": with_row(1, [[-0.4, 1, None]], "input_top_logprobs"),
    "top-k rows are a dict": with_row(1, {"a": 1, "b": 2}, "input_top_logprobs"),
    "top-k rows are a string": with_row(1, "ab", "input_top_logprobs"),
    "a top-k id outside the vocabulary": with_row(1, [[-0.4, 1, None], [-1.5, SIZE, None]], "input_top_logprobs"),
    "top-k probabilities add up to more than 1": with_row(1, [[-0.4, 1, None], [-0.5, 2, None]], "input_top_logprobs"),
    "top-k log-probs below the token's own": with_row(3, [[-0.6, 1, None], [-1.5, 2, None]], "input_top_logprobs"),
    "deep nesting": b"[" * 200_000,
    "deep nesting, closed": b"[" * 100_000 + b"]" * 100_000,
    "deep nesting in a row": with_text(1, "[" * 900 + "]" * 900),
    "truncated": json.dumps(true_answer()).encode()[:-9],
    "not UTF-8": b"\xff\xfe" + json.dumps(true_answer()).encode(),
    "UTF-16": json.dumps(true_answer()).encode("utf-16"),
    "HTML": b"<html><body>502</body></html>",
    "empty": b"",
    "null": b"null",
    "a number": b"7",
    "two answers": json.dumps(true_answer()).encode() * 2,
    "gzip without its header": gzip.compress(json.dumps(true_answer()).encode()),
}  # fmt: skip


def teacher_scores(answer: Callable[[httpx.Request], httpx.Response]):
    async def main():
        client = EngineClient(
            "http://t:1",
            concurrency=2,
            timeout_s=5,
            retries=0,
            vocabulary_size=SIZE,
            transport=httpx.MockTransport(answer),
        )
        teacher = SGLangTeacher(client, ScoreRequest(top_k=K, vocabulary_size=SIZE))
        sample = Sample(Prompt(0, TOKENS[:START], "ab"), TOKENS[START:], "", Status.COMPLETED)
        scores = await teacher.score(sample)
        await client.aclose()
        return scores, teacher

    return asyncio.run(main())


def test_a_valid_answer_is_accepted():
    scores, teacher = teacher_scores(lambda request: httpx.Response(200, content=json.dumps(true_answer()).encode()))
    assert scores.failure is None and not teacher.failures
    assert scores.log_probs.tolist() == [-1.0, -2.0, -0.5]


@pytest.mark.parametrize("body", FAULTS.values(), ids=FAULTS)
def test_every_wrong_answer_is_a_counted_failure(body):
    scores, teacher = teacher_scores(lambda request: httpx.Response(200, content=body))
    assert scores.failure is not None and len(scores.failure) < 700
    assert np.isnan(scores.log_probs).all() and scores.log_probs.shape == (3,)
    assert teacher.failures.total() == 1
