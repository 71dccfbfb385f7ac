"""The probe against a server that answers as sglang 0.5.9 does (tests/e2e asks a real one)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

import httpx
import pytest

from slime_opd.engine.client import EngineClient
from slime_opd.errors import DataError, TeacherError, TeacherMismatch
from slime_opd.teacher.probe import probe_teacher, spread_of_ids, student_facts


class Characters:
    """A tokenizer whose id i is the character `texts[i]`."""

    def __init__(self, texts: Sequence[str], special: Sequence[int] = (0, 1)) -> None:
        self._texts = texts
        self.all_special_ids = list(special)
        self.added_tokens_decoder = {}

    def __len__(self) -> int:
        return len(self._texts)

    def batch_decode(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        return ["".join(self._texts[i] for i in sequence) for sequence in sequences]


TEXTS = [f"<{i}>" for i in range(90)]
SIZE = 100


class Teacher:
    """A server; `largest_id` records the largest id that was given to the model."""

    def __init__(
        self, *, texts: Sequence[str] | None = TEXTS, size: int = SIZE, eos: tuple[int, ...] = (1,), top_k: int = SIZE
    ) -> None:
        self.texts, self.size, self.eos, self.top_k, self.largest_id = texts, size, eos, top_k, 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/get_model_info":
            return httpx.Response(200, json={"model_path": "big", "tokenizer_path": None})
        if request.url.path == "/get_server_info":
            return httpx.Response(200, json={"max_req_input_len": 64})
        body = json.loads(request.content)
        ids, sampling = body["input_ids"], body["sampling_params"]
        for biased in map(int, sampling.get("logit_bias", {})):
            if biased >= self.size:
                message = f"logit_bias must has keys in [0, {self.size - 1}], got {biased}."
                return httpx.Response(400, json={"error": {"message": message}})
            end = "stop" if biased in self.eos else "length"
            return httpx.Response(200, json={"meta_info": {"finish_reason": {"type": end}}})
        self.largest_id = max(self.largest_id, *ids)
        rows = [[-0.1 if i else None, token, self.texts and self.texts[token]] for i, token in enumerate(ids)]
        meta = {"input_token_logprobs": rows}
        if self.top_k and "top_logprobs_num" in body:
            top = [[-0.1, i, None] for i in range(min(self.top_k, body["top_logprobs_num"]))]
            meta["input_top_logprobs"] = [None, *[top] * (len(ids) - 1)]
        return httpx.Response(200, json={"meta_info": meta})


def probed(teacher, *, tokenizer: Characters | None = None, eos_ids=(1,), top_k=0):
    async def main():
        client = EngineClient(
            "http://t:1", concurrency=4, timeout_s=5, retries=0, transport=httpx.MockTransport(teacher)
        )
        try:
            return await probe_teacher(client, tokenizer or Characters(TEXTS), SIZE, eos_ids, top_k)
        finally:
            await client.aclose()

    return asyncio.run(main())


def test_a_fitting_teacher_is_reported():
    teacher = Teacher()
    report = probed(teacher)
    assert report.vocabulary_size == SIZE
    assert 60 <= report.checked_tokens <= 64  # as many as the server takes at once, less those chosen twice
    assert report.eos_ids == (1,)
    assert report.unchecked == ()
    assert teacher.largest_id == 89
    assert f"vocabulary 100, {report.checked_tokens} tokens compared, ends at 1" in str(report)


@pytest.mark.parametrize("size", [99, 101])
def test_another_vocabulary_size_is_refused_before_the_model_sees_a_token(size):
    teacher = Teacher(size=size)
    with pytest.raises(TeacherMismatch, match=f"{size} tokens, the student of 100"):
        probed(teacher)
    assert teacher.largest_id == 0


def test_another_tokenizer_is_refused_with_both_texts():
    other = [*TEXTS[:-1], "other"]
    with pytest.raises(
        TeacherMismatch, match=r"1 of \d+ ids compared differ: id 89 is 'other' to the teacher and '<89>'"
    ):
        probed(Teacher(texts=other))


def test_another_end_of_sequence_is_refused_and_a_shared_one_suffices():
    with pytest.raises(TeacherMismatch, match=r"end-of-sequence ids \[1\]"):
        probed(Teacher(eos=(5,)))
    assert probed(Teacher(eos=(1, 5)), eos_ids=(1, 7)).eos_ids == (1,)


def test_what_cannot_be_checked_is_said():
    report = probed(Teacher(texts=None), eos_ids=())
    assert report.checked_tokens == 0
    assert [gap.split(" (")[0] for gap in report.unchecked] == ["tokenizer", "end-of-sequence"]


def test_a_teacher_that_is_not_there_or_does_not_score_is_an_error():
    def gone(request):
        raise httpx.ConnectError("refused")

    with pytest.raises(TeacherError, match=r"--rm-url.*ConnectError: refused"):
        probed(gone)

    class Silent(Teacher):
        def __call__(self, request):
            answer = super().__call__(request)
            if b"input_token_logprobs" in answer.content:
                return httpx.Response(200, json={"meta_info": {}})
            return answer

    with pytest.raises(TeacherError, match="log-prob rows"):
        probed(Silent())


def test_ids_are_spread_over_the_whole_vocabulary_with_special_ones_and_the_highest():
    tokenizer = Characters([""] * 1000, special=(3, 997))
    ids = spread_of_ids(tokenizer, 1200, 50)
    assert len(ids) == len(set(ids)) <= 50
    assert {3, 997, 999} <= set(ids)
    assert max(b - a for a, b in zip([0, *ids], ids, strict=False)) < 100
    # Without room in the model's vocabulary, the last id stays out: SGLang echoes it as 0.
    assert max(spread_of_ids(tokenizer, 1000, 50)) == 998


def test_the_students_facts_come_from_its_directory(tmp_path):
    (tmp_path / "config.json").write_text('{"text_config": {"vocab_size": 9, "eos_token_id": 4}, "eos_token_id": null}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 6]}')
    assert student_facts(tmp_path) == (9, {4, 6})
    with pytest.raises(DataError, match="no vocab_size"):
        student_facts(tmp_path / "nowhere")


@pytest.mark.parametrize("told", [0, 4])
def test_a_server_that_does_not_tell_its_most_likely_tokens_is_refused_where_they_are_wanted(told):
    assert probed(Teacher(top_k=told)).vocabulary_size == SIZE
    with pytest.raises(TeacherError, match=r"does not score: the engine returned .*top-k"):
        probed(Teacher(top_k=told), top_k=8)
    assert probed(Teacher(), top_k=8).vocabulary_size == SIZE
