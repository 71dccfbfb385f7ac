"""A teacher that scores, one that fails and one that lies; and when failures stop the run."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from dataclasses import replace

import httpx
import numpy as np
import pytest

from slime_opd.config import to_yaml
from slime_opd.config.config import Config
from slime_opd.config.stages import DebugConfig, ModelConfig, OPDConfig, RewardConfig, RolloutConfig
from slime_opd.config.teacher_kinds import TEACHER_KINDS
from slime_opd.engine.client import EngineClient
from slime_opd.errors import ConfigError, TooManyFallbacks
from slime_opd.teacher.fallback import check_fallback
from slime_opd.teacher.sglang import ScoreRequest, SGLangTeacher
from slime_opd.teacher.teacher import TEACHERS, make_teacher
from slime_opd.types import Prompt, Sample, Status, TeacherScores


def sample(response: tuple[int, ...]) -> Sample:
    return Sample(Prompt(0, (4, 5), "ab"), response, "", Status.COMPLETED)


def honest(request: httpx.Request) -> httpx.Response:
    """Scores token i of the sequence -i/10."""
    body = json.loads(request.content)
    start = body["logprob_start_len"]
    rows = [[None if i == start else -i / 10, body["input_ids"][i], None] for i in range(start, len(body["input_ids"]))]
    return httpx.Response(200, json={"meta_info": {"input_token_logprobs": rows}})


def damaged(change):
    def answer(request: httpx.Request) -> httpx.Response:
        rows = json.loads(honest(request).content)["meta_info"]["input_token_logprobs"]
        change(rows)
        return httpx.Response(200, json={"meta_info": {"input_token_logprobs": rows}})

    return answer


def scores_of(answer, *samples: Sample, timeout_s: float = 5.0) -> tuple[list[TeacherScores], SGLangTeacher]:
    async def main():
        client = EngineClient(
            "http://teacher:1", concurrency=2, timeout_s=timeout_s, retries=1,
            transport=httpx.MockTransport(answer), backoff_s=lambda attempt: 0.0,
        )  # fmt: skip
        teacher = SGLangTeacher(client)
        scores = [await teacher.score(one) for one in samples]
        await client.aclose()
        return scores, teacher

    return asyncio.run(main())


def test_entry_t_is_about_response_token_t():
    [scores], _ = scores_of(honest, sample((7, 8, 9)))
    assert scores.failure is None
    np.testing.assert_allclose(scores.log_probs, [-0.2, -0.3, -0.4], rtol=1e-6)
    assert scores.log_probs.dtype == np.float32


def test_an_empty_response_is_scored_without_a_request():
    def never(request):
        raise AssertionError("no request was expected")

    [scores], _ = scores_of(never, sample(()))
    assert scores.log_probs.shape == (0,)
    assert scores.failure is None


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda request: httpx.Response(500, text="no memory"), r"HTTP 500: no memory \(attempts: 2\)"),
        (lambda request: httpx.Response(400, text="too long"), "HTTP 400: too long"),
        (damaged(lambda rows: rows[1].__setitem__(1, 99)), "other tokens than were sent"),
        (damaged(lambda rows: rows[2].__setitem__(0, None)), "no finite log-prob"),
        (damaged(lambda rows: rows.pop()), "log-prob rows"),
        (lambda request: httpx.Response(200, json={"object": "error"}), "no meta_info"),
    ],
)
def test_a_teacher_with_failed_or_false_answers_leaves_nan_and_the_reason(answer, reason):
    [scores], teacher = scores_of(answer, sample((7, 8, 9)))
    assert scores.log_probs.shape == (3,)
    assert np.isnan(scores.log_probs).all()
    assert re.search(reason, scores.failure)
    assert teacher.failures.total() == 1


def test_a_teacher_that_hangs_is_a_failure_after_its_time_limits():
    async def hang(request):
        await asyncio.sleep(60)

    [scores], teacher = scores_of(hang, sample((7,)), timeout_s=0.05)
    assert "no answer within 0.05 s" in scores.failure
    assert teacher.failures == {"timeout": 1}


def test_each_kind_of_failure_is_logged_once_and_all_are_counted(caplog):
    replies = iter(
        [httpx.Response(400, text=f"sequence of {n} is too long") for n in (17, 23, 99)] + [httpx.Response(404)]
    )
    with caplog.at_level(logging.WARNING):
        scores, teacher = scores_of(lambda request: next(replies), *[sample((7,))] * 4)
    assert all(one.failure for one in scores)
    assert len(caplog.records) == 2
    assert sorted(teacher.failures.values()) == [1, 3]


VOCABULARY, TOP = 40, 3
CANDIDATES = np.int32([[0, 7], [39, 2], [3, 9]])


def log_probs_at(position: int) -> np.ndarray:
    """What the server below says of every id at a position of the sequence."""
    logits = np.random.default_rng(position).normal(size=VOCABULARY)
    return logits - np.log(np.exp(logits).sum())


def with_top_k(request: httpx.Request) -> httpx.Response:
    """Answers one sequence or a batch, with the server's own top-k and with the requested ids."""
    body = json.loads(request.content)
    if not isinstance(body["input_ids"][0], list):
        return httpx.Response(200, json=answer_of(body, body["input_ids"], body["logprob_start_len"], None))
    batch = zip(body["input_ids"], body["logprob_start_len"], body["token_ids_logprob"], strict=True)
    return httpx.Response(200, json=[answer_of(body, *one) for one in batch])


def answer_of(body: dict, tokens: list[int], start: int, requested: list[int] | None) -> dict:
    assert body.get("top_logprobs_num", 0) <= VOCABULARY, "sglang would end here"
    positions = range(start + 1, len(tokens))
    row = lambda ids, position: [[float(log_probs_at(position)[i]), int(i), None] for i in ids]  # noqa: E731
    meta = {"input_token_logprobs": [[None, tokens[start], None], *(row([tokens[at]], at)[0] for at in positions)]}
    if k := body.get("top_logprobs_num"):
        meta["input_top_logprobs"] = [None, *(row(np.argsort(-log_probs_at(at))[:k], at) for at in positions)]
    if requested is not None:
        meta["input_token_ids_logprobs"] = [None, *(row(requested, at) for at in positions)]
    return {"meta_info": meta}


def with_candidates(response: tuple[int, ...]) -> Sample:
    made = sample(response)
    made.set("student_top_ids", CANDIDATES[: len(response)])
    return made


def requested_scores(request: ScoreRequest, one: Sample, answer=with_top_k) -> TeacherScores:
    async def main():
        client = EngineClient(
            "http://teacher:1", concurrency=2, timeout_s=5.0, retries=0, transport=httpx.MockTransport(answer)
        )
        scores = await SGLangTeacher(client, request).score(one)
        await client.aclose()
        return scores

    return asyncio.run(main())


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("top_k", "student_top_k"), [(TOP, 0), (0, 2), (TOP, 2), (VOCABULARY, 2)])
def test_top_k_scores_are_of_the_requested_ids_in_compact_arrays(top_k, student_top_k, dtype):
    scores = requested_scores(ScoreRequest(top_k, student_top_k, VOCABULARY, dtype), with_candidates((7, 8, 9)))
    table = np.stack([log_probs_at(at) for at in (2, 3, 4)])
    assert scores.failure is None
    np.testing.assert_allclose(scores.log_probs, table[[0, 1, 2], [7, 8, 9]], rtol=1e-6)
    tolerance = {"rtol": 1e-6 if dtype is np.float32 else 1e-3}
    if top_k:
        assert (scores.top_ids.dtype, scores.top_log_probs.dtype, scores.top_ids.shape) == (np.int32, dtype, (3, top_k))
        np.testing.assert_array_equal(scores.top_ids, np.argsort(-table, axis=1)[:, :top_k])
        expected = np.take_along_axis(table, scores.top_ids, axis=1)
        np.testing.assert_allclose(scores.top_log_probs, expected, **tolerance)
    else:
        assert scores.top_ids is scores.top_log_probs is None
    if student_top_k:
        assert scores.student_log_probs.dtype == dtype
        np.testing.assert_allclose(scores.student_log_probs, np.take_along_axis(table, CANDIDATES, axis=1), **tolerance)
    else:
        assert scores.student_log_probs is None


def test_scores_that_are_missing_have_the_shapes_of_those_that_are_there():
    def without_batches(request):
        return with_top_k(request) if b"token_ids_logprob" not in request.content else httpx.Response(400, text="no")

    request = ScoreRequest(TOP, 2, VOCABULARY)
    failed = requested_scores(request, with_candidates((7, 8, 9)), without_batches)
    assert "HTTP 400: no" in failed.failure
    assert np.isnan(failed.log_probs).all() and np.isnan(failed.student_log_probs).all()
    assert failed.top_ids.shape == failed.top_log_probs.shape == (3, TOP) and failed.student_log_probs.shape == (3, 2)
    empty = requested_scores(request, with_candidates(()), without_batches)
    assert empty.failure is None
    assert empty.top_ids.shape == (0, TOP) and empty.student_log_probs.shape == (0, 2)


@pytest.mark.parametrize("url", ["http://h:5/generate", "http://h:5/generate/", "http://h:5", "http://h:5/"])
def test_the_address_may_name_the_endpoint_or_the_server(url):
    config = Config(reward=RewardConfig(rm_url=url), opd=OPDConfig(use_opd=True, opd_type="sglang"))
    assert make_teacher(config).url == "http://h:5"


def test_the_teachers_key_comes_from_the_environment_and_its_vocabulary_from_the_student(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text('{"vocab_size": 40}')
    seen = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return honest(request)

    monkeypatch.setenv("SLIME_OPD_TEACHER_API_KEY", "hunter2")
    config = Config(
        reward=RewardConfig(rm_url="http://h:5/generate"),
        opd=OPDConfig(use_opd=True, opd_type="sglang"),
        model=ModelConfig(hf_checkpoint=str(tmp_path)),
    )
    teacher = make_teacher(config)
    teacher._client._transport = httpx.MockTransport(answer)
    assert asyncio.run(teacher.score(sample((7, 8)))).failure is None
    assert seen[0].headers["authorization"] == "Bearer hunter2"
    assert teacher._client.vocabulary_size == 40
    assert "hunter2" not in to_yaml(config)


def test_a_teacher_without_an_address_is_a_config_error():
    with pytest.raises(ConfigError, match="--rm-url"):
        make_teacher(Config(opd=OPDConfig(use_opd=True, opd_type="sglang")))


def test_every_kind_of_teacher_has_its_row_and_those_that_score_rollouts_are_made():
    assert list(TEACHERS) == list(TEACHER_KINDS)
    for name, make in TEACHERS.items():
        assert (make is not None) == TEACHER_KINDS[name].scores_rollouts != TEACHER_KINDS[name].is_in_trainer


def test_a_run_whose_rollouts_no_server_scores_makes_no_teacher():
    sglang = Config(reward=RewardConfig(rm_url="http://h:5"), opd=OPDConfig(use_opd=True, opd_type="sglang"))
    assert make_teacher(sglang) is not None
    assert make_teacher(replace(sglang, debug=DebugConfig(load_debug_rollout_data="{rollout_id}"))) is None
    assert make_teacher(replace(sglang, opd=OPDConfig(opd_type="sglang"))) is None
    assert make_teacher(replace(sglang, opd=OPDConfig(use_opd=True, opd_type="megatron"))) is None
    assert make_teacher(Config()) is None


def test_the_teacher_generates_with_the_rollouts_time_limit_and_its_own_address():
    config = Config(
        reward=RewardConfig(rm_url="http://me:hunter2@h:5"),
        opd=OPDConfig(use_opd=True, opd_type="sglang", opd_teacher_timeout_s=7),
        rollout=RolloutConfig(rollout_request_timeout_s=300),
    )
    client = make_teacher(config).generation_client()
    assert (client.url, client._timeout_s) == ("http://***@h:5", 300)


@pytest.mark.parametrize(("failed", "total", "limit"), [(0, 8, 0.0), (1, 10, 0.1), (0, 0, 0.0), (8, 8, 1.0)])
def test_failures_up_to_the_limit_pass(failed, total, limit):
    check_fallback(failed, total, limit)


@pytest.mark.parametrize(("failed", "total", "limit"), [(1, 8, 0.0), (2, 10, 0.1), (8, 8, 0.99)])
def test_failures_past_the_limit_stop_the_run(failed, total, limit):
    with pytest.raises(TooManyFallbacks, match=f"{failed} of {total} .*--opd-max-fallback-fraction.*late"):
        check_fallback(failed, total, limit, "no answer: late")
