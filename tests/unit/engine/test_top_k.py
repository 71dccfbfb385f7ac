"""Top-k log-probs on the wire: rows to arrays, what is missing, and how it is asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime_opd.engine.top_k import (
    Segment,
    TopK,
    fill,
    lookup,
    missing_segments,
    parse_rows,
    parse_top_k,
    segments_payload,
)
from slime_opd.errors import EngineError


def rows(ids: np.ndarray, table: np.ndarray) -> list:
    """SGLang's rows of ids [R, K] out of the log-probs `table` [R, V]."""
    return [[[float(table[t, i]), int(i), None] for i in of_token] for t, of_token in enumerate(ids)]


def table_of(length: int, vocabulary: int, seed: int = 0) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(length, vocabulary))
    return (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)


def top_of(table: np.ndarray, n: int) -> TopK:
    ids = np.argsort(-table, axis=1)[:, :n].astype(np.int32)
    return TopK(ids, np.take_along_axis(table, ids, axis=1))


def test_rows_become_compact_arrays():
    table = table_of(3, 9)
    ids = np.array([[8, 0], [1, 2], [4, 3]])
    found = parse_rows(rows(ids, table), 3, 2)
    assert (found.ids.dtype, found.log_probs.dtype) == (np.int32, np.float32)
    assert found.ids.tolist() == ids.tolist()
    np.testing.assert_array_equal(found.log_probs, np.take_along_axis(table, ids, axis=1))


def test_the_first_row_is_of_the_token_before_the_response():
    given_rows = rows(np.array([[1], [2]]), table_of(2, 4))
    answer = {"meta_info": {"input_top_logprobs": [None, *given_rows]}}
    own = np.full(2, -9, np.float32)
    assert parse_top_k(answer, own, 1).ids.tolist() == [[1], [2]]
    with pytest.raises(EngineError, match="not 2 lists of 1 rows"):
        parse_top_k({"meta_info": {"input_top_logprobs": given_rows}}, own, 1)
    with pytest.raises(EngineError, match="above its most likely token's"):
        parse_top_k(answer, np.float32([-9, 0]), 1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda table: table.pop(), "top-k"),
        (lambda table: table[1].pop(), "top-k"),
        (lambda table: table[1].append([-1.0, 3, None]), "top-k"),
        (lambda table: table.__setitem__(1, None), "top-k"),
        (lambda table: table[0].__setitem__(0, [None, 3, None]), "finite"),
        (lambda table: table[0].__setitem__(0, [float("-inf"), 3, None]), "finite"),
        (lambda table: table[0].__setitem__(0, ["x", 3, None]), "rows that are not"),
        (lambda table: table.__setitem__(0, {"a": 1, "b": 2}), "rows that are not"),
        (lambda table: table[0].__setitem__(0, [-1.0, -3, None]), "token id -3, expected 0 to"),
        (lambda table: table[0].__setitem__(0, [-1.0, 2**31, None]), "token id 2147483648, expected 0 to"),
        (lambda table: table[2].__setitem__(slice(None), [[-0.3, 3, None], [-0.4, 1, None]]), "add up to 1.41"),
    ],
)
def test_rows_of_another_request_are_errors(damage, message):
    given_rows = rows(np.array([[1, 2], [3, 0], [2, 1]]), table_of(3, 4))
    damage(given_rows)
    with pytest.raises(EngineError, match=message):
        parse_rows(given_rows, 3, 2)


@pytest.mark.parametrize("nothing", [None, []])
def test_missing_rows_are_an_error_unless_there_are_no_tokens(nothing):
    assert parse_rows(nothing, 0, 3).ids.shape == (0, 3)
    with pytest.raises(EngineError, match="top-k"):
        parse_rows(nothing, 2, 3)


class Server:
    """Answers a batch as SGLang does, from a table of true log-probs; counts what it tells."""

    def __init__(self, table: np.ndarray, prompt_length: int) -> None:
        self.table, self.prompt_length, self.told = table, prompt_length, 0

    def __call__(self, payload: dict) -> list:
        return [
            self._answer(*one)
            for one in zip(
                payload["input_ids"], payload["logprob_start_len"], payload["token_ids_logprob"], strict=True
            )
        ]

    def _answer(self, tokens: list[int], start: int, ids: list[int]) -> dict:
        first = start + 1 - self.prompt_length
        length = len(tokens) - start - 1
        asked = np.tile(ids, (length, 1))
        self.told += asked.size
        own = np.array(tokens[start + 1 :])
        sampled = [[float(self.table[first + i, token]), int(token), None] for i, token in enumerate(own)]
        return {
            "meta_info": {
                "input_token_logprobs": [[None, tokens[start], None], *sampled],
                "input_token_ids_logprobs": [None, *rows(asked, self.table[first : first + length])],
            }
        }


@given(st.integers(1, 80), st.integers(1, 6), st.integers(1, 12), st.integers(0, 1000))
def test_candidates_are_scored_exactly_for_any_top_k(length, k, n, seed):
    random = np.random.default_rng(seed)
    table, prompt = table_of(length, 24, seed), 3
    tokens = random.integers(0, 23, prompt + length).tolist()
    candidates = np.argsort(random.random((length, 24)), axis=1)[:, :k].astype(np.int32)
    known = lookup(candidates, top_of(table, n))
    expected = np.take_along_axis(table, candidates, axis=1)
    in_top = (candidates[:, :, None] == top_of(table, n).ids[:, None, :]).any(axis=2)
    np.testing.assert_array_equal(np.isnan(known), ~in_top)
    segments = missing_segments(candidates, np.isnan(known))
    server = Server(table, prompt)
    answers = server(segments_payload(tokens, prompt, segments)) if segments else []
    np.testing.assert_array_equal(fill(known, candidates, segments, answers, tokens, prompt), expected)


def test_only_missing_candidates_are_requested():
    candidates = np.tile(np.int32([5, 6]), (40, 1))
    missing = np.zeros((40, 2), bool)
    missing[3, 0] = missing[7, 1] = missing[33, 1] = True
    segments = missing_segments(candidates, missing)
    assert [(one.start, one.end, one.ids.tolist()) for one in segments] == [(3, 8, [5, 6]), (33, 34, [6])]
    payload = segments_payload(tuple(range(42)), 2, segments)
    assert [len(ids) for ids in payload["input_ids"]] == [10, 36]
    assert payload["logprob_start_len"] == [4, 34]
    assert payload["token_ids_logprob"] == [[5, 6], [6]]


def test_longer_responses_have_longer_segments():
    candidates = np.zeros((20_000, 1), np.int32)
    assert len(missing_segments(candidates, np.ones((20_000, 1), bool))) == 400


def test_answers_about_other_candidates_or_tokens_are_errors():
    table, tokens = table_of(2, 8), (1, 2, 3)
    candidates, known = np.int32([[4], [5]]), np.full((2, 1), np.nan, np.float32)
    segments = [Segment(0, 2, np.int32([4, 5]))]
    server = Server(table, 1)
    payload = segments_payload(tokens, 1, segments)
    with pytest.raises(EngineError, match="other candidates"):
        fill(known, candidates, segments, server({**payload, "token_ids_logprob": [[4, 6]]}), tokens, 1)
    with pytest.raises(EngineError, match="other tokens"):
        fill(known, candidates, segments, server({**payload, "input_ids": [[1, 2, 4]]}), tokens, 1)
    with pytest.raises(EngineError, match="1 answers to a batch of 2"):
        fill(known, candidates, segments * 2, server(payload), tokens, 1)
