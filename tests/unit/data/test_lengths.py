"""Which prompts are too long, for generation and for supervised fine-tuning, and what is then refused or dropped."""

import json

import pytest
from byte_tokenizer import byte_tokenizer

from slime_opd.config import parse
from slime_opd.data.lengths import CONTEXT, MICRO_BATCH, NO_RESPONSE, PROMPT_LIMIT, LengthLimits
from slime_opd.data.source import PromptSource, read_eval_set
from slime_opd.errors import DataError


@pytest.mark.parametrize(
    ("limits", "prompt", "response", "reason"),
    [
        ({"context": 8}, 7, None, None),
        ({"context": 8}, 8, None, NO_RESPONSE),
        ({"context": 8}, 5, 3, None),
        ({"context": 8}, 5, 4, CONTEXT),
        ({"context": 8, "max_sample": 6}, 3, 4, MICRO_BATCH),
        ({"max_sample": 6}, 3, 3, None),
        ({"max_prompt": 4, "context": 4}, 5, None, PROMPT_LIMIT),
        ({"max_prompt": 4}, 4, None, None),
        ({}, 10**9, None, None),
    ],
)
def test_the_limit_that_a_row_exceeds(limits, prompt, response, reason):
    assert LengthLimits(**limits).exceeded(prompt, response) == reason


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def path(tmp_path):
    rows = [{"input": "x" * length, "label": "y" * 4} for length in (3, 9, 20, 4, 30)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def run(path, *flags):
    return parse(["--prompt-data", path, "--label-key", "label", "--rollout-max-context-len", "20", *flags])


def test_prompts_without_a_token_for_a_response_are_refused_counted_and_the_first_is_named(path, tokenizer):
    with pytest.raises(DataError) as caught:
        PromptSource.of_run(run(path), tokenizer)
    assert str(caught.value) == (
        f"{path}: 2 of 5 prompts are too long, leaving no token for a response in a context of 20; the first is line 3 with 20 tokens: "
        "drop them with --too-long-prompts drop, or raise --rollout-max-context-len, up to the model's own limit"
    )


def test_too_long_prompts_are_dropped_and_counted_with_the_flag(path, tokenizer):
    source = PromptSource.of_run(run(path, "--too-long-prompts", "drop"), tokenizer)
    assert [len(prompt.tokens) for prompt in source.take(3)] == [3, 9, 4]
    assert source.summary.notes == (
        f"{path}: 2 of 5 prompts dropped by --too-long-prompts drop; the first is line 3 with 20 tokens",
    )


def test_the_prompt_limit_drops_first_and_what_it_drops_is_no_problem(path, tokenizer):
    source = PromptSource.of_run(run(path, "--rollout-max-prompt-len", "4"), tokenizer)
    assert [len(prompt.tokens) for prompt in source.take(2)] == [3, 4]
    assert source.summary.notes == (f"{path}: 3 of 5 prompts dropped by --rollout-max-prompt-len 4",)


def test_dropping_every_prompt_is_an_error(path, tokenizer):
    with pytest.raises(DataError, match=r"--too-long-prompts drop drops all 5 prompts \(the shortest has 3 tokens\)"):
        PromptSource.of_run(run(path, "--rollout-max-context-len", "3", "--too-long-prompts", "drop"), tokenizer)


def test_fine_tuning_counts_the_response_against_the_context_and_the_micro_batch(path, tokenizer):
    sft = ("--loss-type", "sft_loss")
    with pytest.raises(
        DataError, match=r"2 of 5 prompts are too long, with their response longer than the context of 20"
    ):
        PromptSource.of_run(run(path, *sft), tokenizer)
    packed = (*sft, "--use-dynamic-batch-size", "--max-tokens-per-gpu", "12")
    with pytest.raises(DataError) as caught:
        PromptSource.of_run(run(path, *packed), tokenizer)
    # 9 + 4 and an end of sequence are 14 of 12; the two of 20 and 30 pass the context already.
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert (
        "1 of 5 prompts are too long, with their response longer than --max-tokens-per-gpu 12; the first is line 2"
        in lines[0]
    )
    source = PromptSource.of_run(run(path, *packed, "--too-long-prompts", "drop"), tokenizer)
    assert [len(prompt.tokens) for prompt in source.take(2)] == [3, 4]


def test_a_response_of_another_model_may_be_cut_and_is_not_counted(tmp_path, tokenizer):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"input": "xxx", "label": "", "answer": "y" * 100}) + "\n")
    source = PromptSource.of_run(run(str(file), "--opd-off-policy-key", "answer"), tokenizer)
    assert len(source.first.response_tokens) == 101


def test_evaluation_sets_have_the_same_rule_and_not_the_prompt_limit_of_training(path, tokenizer):
    with pytest.raises(DataError, match=r"^--eval-prompt-data small: .*2 of 5 prompts are too long"):
        read_eval_set("small", path, run(path, "--rollout-max-prompt-len", "4"), tokenizer)
    prompts, summary = read_eval_set("small", path, run(path, "--too-long-prompts", "drop"), tokenizer)
    assert [prompt.index for prompt in prompts] == [0, 1, 2]
    assert "2 of 5 prompts dropped" in summary.notes[0]
