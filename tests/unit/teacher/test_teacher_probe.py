"""The probe against a server that answers as sglang 0.5.9 does (tests/e2e asks a real one)."""

from __future__ import annotations

import asyncio

import httpx
import numpy as np
import pytest
from scripted_teacher import SIZE, TEXTS, Characters, ScriptedTeacher, each, one, shifted

from slime_opd.engine.client import EngineClient
from slime_opd.errors import DataError, TeacherError, TeacherMismatch
from slime_opd.teacher.facts import student_facts
from slime_opd.teacher.probe import probe_teacher
from slime_opd.teacher.tokenizers import compare_tokenizers, spread_of_ids


def probed(teacher, *, tokenizer: Characters | None = None, eos_ids=(1,), top_k=0):
    async def main():
        client = EngineClient(
            "http://me:pw@t:1", concurrency=4, timeout_s=5, retries=0, transport=httpx.MockTransport(teacher)
        )
        try:
            return await probe_teacher(client, tokenizer or Characters(), SIZE, eos_ids, top_k)
        finally:
            await client.aclose()

    return asyncio.run(main())


def test_a_fitting_teacher_is_reported():
    teacher = ScriptedTeacher()
    report = probed(teacher)
    assert report.vocabulary_size == SIZE
    assert 60 <= report.checked_tokens <= 64  # as many as the server takes at once, less those chosen twice
    assert report.eos_ids == (1,)
    assert report.unchecked == ()
    assert 89 <= teacher.largest_id < SIZE
    assert str(report) == (
        f"teacher big at http://***@t:1, 100 tokens in its vocabulary, {report.checked_tokens} of them compared, ends at 1, log-probs repeat to 0 nats"
    )
    assert report.fingerprint.sequences[0] != report.fingerprint.sequences[1]
    assert not {0, 1, 99} & {token for sequence in report.fingerprint.sequences for token in sequence}


@pytest.mark.parametrize("size", [99, 101])
def test_another_vocabulary_size_is_refused_before_the_model_sees_a_token(size):
    teacher = ScriptedTeacher(size=size)
    with pytest.raises(TeacherMismatch, match=f"{size} tokens, the student of 100"):
        probed(teacher)
    assert teacher.largest_id == 0


def test_another_tokenizer_is_refused_with_both_texts():
    other = [*TEXTS[:-1], "other"]
    with pytest.raises(
        TeacherMismatch, match=r"1 of \d+ ids compared differ: id 89 is 'other' to the teacher and '<89>'"
    ):
        probed(ScriptedTeacher(texts=other))


def test_another_end_of_sequence_is_refused_and_a_shared_one_suffices():
    with pytest.raises(TeacherMismatch, match=r"end-of-sequence ids \[1\]"):
        probed(ScriptedTeacher(eos=(5,)))
    assert probed(ScriptedTeacher(eos=(1, 5)), eos_ids=(1, 7)).eos_ids == (1,)


def test_the_report_names_what_could_not_be_checked():
    report = probed(ScriptedTeacher(texts=None), eos_ids=())
    assert report.checked_tokens == 0
    assert [gap.split(" (")[0] for gap in report.unchecked] == ["tokenizer", "end-of-sequence"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0", "model": null}'])
def test_a_damaged_tokenizer_of_the_teacher_on_this_machine_is_reported_as_not_compared(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    report = probed(ScriptedTeacher(texts=None, tokenizer_path=str(tmp_path)))
    assert report.checked_tokens == 0
    assert [gap for gap in report.unchecked if gap.startswith("tokenizer") and str(tmp_path) in gap]


def test_a_teacher_that_is_not_there_or_does_not_score_is_an_error():
    def gone(request):
        raise httpx.ConnectError("refused")

    with pytest.raises(TeacherError, match=r"--rm-url.*ConnectError: refused"):
        probed(gone)

    class Silent(ScriptedTeacher):
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
def test_a_server_that_does_not_return_its_top_k_tokens_is_refused_where_they_are_needed(told):
    assert probed(ScriptedTeacher(top_k=told)).vocabulary_size == SIZE
    with pytest.raises(TeacherError, match=r"does not score: the engine returned .*top-k"):
        probed(ScriptedTeacher(top_k=told), top_k=8)
    assert probed(ScriptedTeacher(), top_k=8).vocabulary_size == SIZE


def test_a_server_for_short_inputs_is_used_without_a_check_of_its_log_probs():
    report = probed(ScriptedTeacher(max_input=8))
    assert report.fingerprint is None
    assert report.unchecked == ("log-probs (the server takes 8 tokens only)",)


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.2])
@pytest.mark.parametrize("model", range(5))
def test_an_honest_teacher_passes_whatever_its_noise(model, noise):
    report = probed(ScriptedTeacher(model=model, noise=noise), top_k=8 if not noise else 0)
    assert noise / 2 <= report.fingerprint.spread <= 2 * noise


LIES = {
    "raised by 5": (
        each(lambda value: value + 5),
        "expected at most 0|nats away from those it returns as it generates",
    ),
    "lowered by 5": (each(lambda value: value - 5), "nats away from those it returns as it generates"),
    "probabilities": (each(np.exp), "expected at most 0"),
    "at another temperature": (each(lambda value: 2 * value), "nats away from those it returns as it generates"),
    "without a sign": (each(abs), "expected at most 0"),
    "constant": (
        each(lambda value: -1.0),
        "with another token at a position, the log-prob at that position stays the same",
    ),
    "a token late": (shifted(1), "constant, or shifted"),
    "two tokens late": (shifted(2), "constant, or shifted"),
    "a token early": (shifted(-1), "the log-prob 1 before it changes"),
    "two tokens early": (shifted(-2), r"the log-prob [12] before it changes"),
    "a placeholder": (one(-1, -1e30), r"log-prob -1e\+30, expected at least -1000"),
    "a null": (one(5, None), "no finite log-prob"),
    "a string": (one(5, "-1.0"), "rows that are not"),
}


@pytest.mark.parametrize(("lie", "reason"), LIES.values(), ids=LIES)
def test_a_teacher_that_lies_from_the_start_is_refused(lie, reason):
    with pytest.raises(TeacherError, match=reason):
        probed(ScriptedTeacher(lie=lie))


def test_a_model_that_sees_later_tokens_is_refused():
    class Bidirectional(ScriptedTeacher):
        def _scored(self, body):
            meta, total = super()._scored(body), sum(body["input_ids"])
            return meta | {"input_token_logprobs": each(lambda value: value - total % 7)(meta["input_token_logprobs"])}

    with pytest.raises(TeacherError, match="its model sees later tokens"):
        probed(Bidirectional())


def test_an_address_with_two_models_behind_it_is_refused():
    replicas, random = [ScriptedTeacher(), ScriptedTeacher(model=1)], np.random.default_rng(0)
    with pytest.raises(TeacherError, match="do the servers behind this address serve different models"):
        probed(lambda request: replicas[random.integers(2)](request))


def test_tokenizers_are_compared_id_by_id():
    assert compare_tokenizers(Characters(), Characters(), "T").startswith("all 90 ids")
    fewer = compare_tokenizers(Characters(), Characters(TEXTS[:-1]), "T")
    assert fewer.startswith("all 89 ids") and fewer.endswith("(1 only the student's, from 89)")
    other = Characters([*TEXTS[:5], "x", *TEXTS[6:]])
    with pytest.raises(
        TeacherMismatch, match="1 of 90 ids compared differ: id 5 is 'x' to the teacher and '<5>' to the student"
    ):
        compare_tokenizers(Characters(), other, "T")


def test_another_spelling_of_the_same_text_is_no_difference():
    class Spelled(Characters):
        def get_vocab(self):
            return {f"\u2581{text}": i for text, i in super().get_vocab().items()}

    assert compare_tokenizers(Characters(), Spelled(), "T").startswith("all 90 ids")
