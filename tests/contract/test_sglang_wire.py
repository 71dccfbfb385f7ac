"""The protocol against answers recorded from sglang 0.5.9 serving a tiny random Qwen3 (vocabulary 64) on a CPU."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from slime_opd.engine import protocol, top_k
from slime_opd.engine.protocol import SamplingParams
from slime_opd.engine.top_k import Segment
from slime_opd.errors import EngineError

SEQUENCE = (3, 40, 5, 38, 12)


def recorded(name: str) -> dict:
    return json.loads((Path(__file__).parent / f"sglang_0_5_9_{name}.json").read_text())


def test_a_response_that_reached_its_length_limit():
    answer = recorded("generation_length")
    generation = protocol.parse_generation(answer)
    rows = answer["meta_info"]["output_token_logprobs"]
    assert generation.token_ids == tuple(answer["output_ids"]) == tuple(row[1] for row in rows)
    assert len(generation.token_ids) == 4
    assert generation.log_probs.dtype == np.float32
    assert generation.log_probs.tolist() == [np.float32(row[0]) for row in rows]
    assert generation.finish_reason == "length"
    assert generation.weight_version == "default"


def test_a_response_that_ended_with_a_stop_token_keeps_it():
    generation = protocol.parse_generation(recorded("generation_stop"))
    assert generation.finish_reason == "stop"
    assert len(generation.token_ids) == len(generation.log_probs) == 1


def test_scores_start_with_the_first_response_token():
    answer = recorded("scores")
    rows = answer["meta_info"]["input_token_logprobs"]
    assert rows[0][:2] == [None, SEQUENCE[1]]  # the last prompt token, which the request starts at
    scores = protocol.parse_scores(answer, SEQUENCE, 2)
    assert scores.dtype == np.float32
    assert scores.tolist() == [np.float32(row[0]) for row in rows[1:]]
    assert [row[1] for row in rows[1:]] == list(SEQUENCE[2:])


def test_the_last_id_of_the_vocabulary_is_recognised_although_sglang_echoes_it_as_zero():
    answer = recorded("scores_last_id")
    sent = (3, 40, 63, 38, 63)
    assert [row[1] for row in answer["meta_info"]["input_token_logprobs"]] == [40, 0, 38, 0]
    scores = protocol.parse_scores(answer, sent, 2, vocabulary_size=64)
    assert np.isfinite(scores).all()
    for lie in ((3, 40, 62, 38, 63), (3, 40, 5, 38, 63), (3, 41, 63, 38, 63)):
        with pytest.raises(EngineError, match="scored other tokens than were sent"):
            protocol.parse_scores(answer, lie, 2, vocabulary_size=64)
    for size in (None, 63, 65):  # no other id may come back as 0
        with pytest.raises(EngineError, match="id 0 instead of 63 at position 2"):
            protocol.parse_scores(answer, sent, 2, vocabulary_size=size)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda rows: rows.pop(), "returned 3 of the 4 requested log-prob rows"),
        (lambda rows: rows.append([-1.0, 3, None]), "returned 5 of the 4"),
        (lambda rows: rows[2].__setitem__(1, 7), "id 7 instead of 38 at position 3"),
        (lambda rows: rows[2].__setitem__(0, None), "no finite log-prob for 1 of 3 tokens"),
        (lambda rows: rows[1].__setitem__(0, float("-inf")), "no finite log-prob"),
        (lambda rows: rows.__setitem__(1, "x"), "log-prob rows that are not"),
        (lambda rows: rows.__setitem__(1, {"log_prob": -1.0}), "log-prob rows that are not"),
        (lambda rows: rows.__setitem__(1, 5), "log-prob rows that are not"),
        (lambda rows: rows.__setitem__(1, [-1.0]), "log-prob rows that are not"),
        (lambda rows: rows[1].__setitem__(0, "-1.0"), "log-prob rows that are not"),
        (lambda rows: rows[1].__setitem__(0, True), "log-prob rows that are not"),
        (lambda rows: rows[1].__setitem__(0, -(10**400)), "log-prob rows that are not"),
        (lambda rows: rows[1].__setitem__(1, "5"), "log-prob rows that are not"),
        (lambda rows: rows[1].__setitem__(1, 5.0), "log-prob rows that are not"),
        (lambda rows: rows[1].__setitem__(1, float("inf")), "log-prob rows that are not"),
        (lambda rows: rows[1].__setitem__(1, 10**30), "log-prob rows that are not"),
        (lambda rows: rows[1].__setitem__(0, 0.3), "log-prob 0.3, expected at most 0, for 1 of 3 tokens"),
        (lambda rows: rows[1].__setitem__(0, -1e30), r"log-prob -1e\+30, expected at least -1000, for 1 of 3 tokens"),
    ],
)
def test_scores_that_are_not_about_the_sent_tokens_are_errors(damage, message):
    answer = copy.deepcopy(recorded("scores"))
    damage(answer["meta_info"]["input_token_logprobs"])
    with pytest.raises(EngineError, match=message):
        protocol.parse_scores(answer, SEQUENCE, 2)


@pytest.mark.parametrize(
    "answer", [{}, {"meta_info": None}, [], {"meta_info": {"finish_reason": {"type": "stop"}}}, {"meta_info": {}}]
)
def test_answers_without_their_parts_are_errors(answer):
    with pytest.raises(EngineError):
        protocol.parse_generation(answer)
    with pytest.raises(EngineError):
        protocol.parse_scores(answer, SEQUENCE, 2)


def test_a_generation_with_a_log_prob_that_is_not_a_number_is_an_error():
    answer = recorded("generation_length")
    answer["meta_info"]["output_token_logprobs"][1][0] = None
    with pytest.raises(EngineError, match="no finite log-prob for 1 of 4 tokens of a response"):
        protocol.parse_generation(answer)


def test_rounding_above_zero_is_zero():
    answer = recorded("scores")
    answer["meta_info"]["input_token_logprobs"][1][0] = 1.2e-7
    assert protocol.parse_scores(answer, SEQUENCE, 2)[0] == 0


def test_a_generation_with_an_id_outside_the_vocabulary_is_an_error():
    answer = recorded("generation_length")
    largest = max(answer["output_ids"])
    assert protocol.parse_generation(answer, largest + 1).token_ids == tuple(answer["output_ids"])
    with pytest.raises(EngineError, match=f"token id {largest}, expected 0 to {largest - 1}"):
        protocol.parse_generation(answer, largest)


def test_the_model_info_of_a_server():
    answers = recorded("info")
    info = protocol.parse_model_info(answers["model_info"], answers["server_info"])
    assert info == protocol.ModelInfo(
        model_path="/models/tiny",
        tokenizer_path="/models/tiny",
        has_tokenizer=True,
        weight_version="default",
        max_input_length=506,
        vocab_size=None,
        version="0.5.9",
    )
    with pytest.raises(EngineError, match="model_path"):
        protocol.parse_model_info({"object": "list"}, {})


def test_a_generation_request():
    sampling = SamplingParams(0.7, 0.9, 20, 16, stop=("\n",), stop_token_ids=(5,), seed=3)
    assert protocol.generate_payload((1, 2), sampling) == {
        "input_ids": [1, 2],
        "return_logprob": True,
        "sampling_params": {
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 20,
            "max_new_tokens": 16,
            "skip_special_tokens": False,
            "no_stop_trim": True,
            "spaces_between_special_tokens": False,
            "stop": ["\n"],
            "stop_token_ids": [5],
            "sampling_seed": 3,
        },
    }
    assert not {"stop", "stop_token_ids", "sampling_seed"} & SamplingParams(1.0, 1.0, -1, 4).payload().keys()


@pytest.mark.parametrize(("prompt_length", "start"), [(2, 1), (1, 0)])
def test_a_scoring_request_generates_nothing_and_starts_one_before_the_response(prompt_length, start):
    payload = protocol.score_payload(SEQUENCE, prompt_length)
    assert payload["input_ids"] == list(SEQUENCE)
    assert payload["logprob_start_len"] == start
    assert payload["sampling_params"]["max_new_tokens"] == 0
    assert payload["return_logprob"] is True


def test_a_response_without_a_prompt_cannot_be_scored():
    with pytest.raises(EngineError, match="without a prompt"):
        protocol.parse_scores(recorded("scores"), SEQUENCE, 0)


def test_the_servers_most_likely_tokens_begin_with_the_first_response_token():
    answer = recorded("top_k")
    assert answer["meta_info"]["input_top_logprobs"][0] is None
    found = top_k.parse_top_k(answer, protocol.parse_scores(answer, SEQUENCE, 2), 3)
    assert found.ids.shape == found.log_probs.shape == (3, 3)
    assert (np.diff(found.log_probs, axis=1) <= 0).all()
    rows = answer["meta_info"]["input_top_logprobs"][1:]
    assert found.ids.tolist() == [[row[1] for row in of_token] for of_token in rows]
    assert found.log_probs.tolist() == [[np.float32(row[0]) for row in of_token] for of_token in rows]


def test_candidates_come_in_a_batch_of_segments_and_the_last_id_is_not_echoed_as_zero():
    answers = recorded("candidates")
    segments = [Segment(0, 2, np.int32([7, 63])), Segment(2, 3, np.int32([0]))]
    candidates = np.int32([[63, 7], [7, 63], [0, 0]])
    filled = top_k.fill(np.full((3, 2), np.nan, np.float32), candidates, segments, answers, SEQUENCE, 2)
    told = [row for answer in answers for row in answer["meta_info"]["input_token_ids_logprobs"][1:]]
    expected = [[told[0][1][0], told[0][0][0]], [told[1][0][0], told[1][1][0]], [told[2][0][0]] * 2]
    np.testing.assert_array_equal(filled, np.float32(expected))


def test_a_generations_most_likely_tokens_are_at_its_own_positions():
    generation = protocol.parse_generation(recorded("generation_top_k"))
    found = top_k.parse_rows(generation.top_rows, len(generation.token_ids), 2)
    assert (np.diff(found.log_probs, axis=1) <= 0).all()
    assert (generation.log_probs <= found.log_probs[:, 0]).all()
