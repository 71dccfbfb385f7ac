"""The prompt source: both layouts, the cursor, the length limit, fine-tuning, evaluation sets."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from byte_tokenizer import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from slime_opd.config import Config
from slime_opd.config.stages import DataConfig, EvaluationConfig
from slime_opd.data.source import PromptSource, read_eval_set
from slime_opd.errors import CheckpointError, ConfigError, DataError

EOS = "<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def seven_prompts(tmp_path_factory):
    rows = [{"input": f"prompt {n}", "label": str(n)} for n in range(7)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "seven.jsonl", rows)


def shuffled(path, **options):
    return DataConfig(prompt_data=path, label_key="label", rollout_shuffle=True, **options)


def test_verls_parquet_and_slimes_jsonl_give_the_same_prompts(tmp_path, tokenizer):
    message = [{"role": "user", "content": "What is 1 + 1?"}]
    verl = str(tmp_path / "verl.parquet")
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(
            [{"prompt": message, "reward_model": {"ground_truth": "2", "style": "rule"}, "extra_info": {"index": 4}}]
        ),
        verl,
    )
    slime = write_jsonl(tmp_path / "slime.jsonl", [{"prompt": message, "label": "2", "metadata": {"index": 4}}])
    text = write_jsonl(
        tmp_path / "text.jsonl", [{"prompt": message[0]["content"], "label": 2, "metadata": {"index": 4}}]
    )
    common = {"input_key": "prompt", "apply_chat_template": True}
    options = [
        DataConfig(prompt_data=verl, label_key="reward_model.ground_truth", metadata_key="extra_info", **common),
        DataConfig(prompt_data=slime, label_key="label", **common),
        DataConfig(prompt_data=text, label_key="label", **common),
    ]
    from_verl, from_slime, from_text = (PromptSource(data, tokenizer).take(1)[0] for data in options)
    assert from_verl == from_slime == from_text
    assert from_verl.label == "2"
    assert from_verl.metadata == {"index": 4}
    assert from_verl.text == f"<|im_start|>user\nWhat is 1 + 1?{EOS}\n<|im_start|>assistant\n"
    assert tokenizer.decode(from_verl.tokens) == from_verl.text
    assert all(type(token) is int for token in from_verl.tokens)


def test_prompts_come_in_file_order_epoch_after_epoch_and_are_counted_through(seven_prompts, tokenizer):
    source = PromptSource(DataConfig(prompt_data=seven_prompts, label_key="label"), tokenizer)
    prompts = source.take(16)
    assert len(source) == 7
    assert [int(prompt.label) for prompt in prompts] == [n % 7 for n in range(16)]
    assert [prompt.index for prompt in prompts] == list(range(16))


def test_each_epoch_is_shuffled_anew_and_holds_every_prompt_once(seven_prompts, tokenizer):
    labels = [prompt.label for prompt in PromptSource(shuffled(seven_prompts), tokenizer).take(21)]
    epochs = [tuple(labels[start : start + 7]) for start in (0, 7, 14)]
    assert all(sorted(epoch) == list("0123456") for epoch in epochs)
    assert len(set(epochs)) == 3


def test_the_shuffle_follows_the_seed_and_epoch_e_is_epoch_0_of_seed_plus_e(seven_prompts, tokenizer):
    def labels(seed, count):
        return [
            prompt.label for prompt in PromptSource(shuffled(seven_prompts, rollout_seed=seed), tokenizer).take(count)
        ]

    assert labels(1, 14) == labels(1, 14)
    assert labels(1, 14)[7:] == labels(2, 7)
    assert labels(1, 7) != labels(2, 7)


@settings(max_examples=50, deadline=None)
@given(chunks=st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=8))
def test_any_chunking_with_any_saves_and_restores_gives_one_and_the_same_sequence(seven_prompts, chunks):
    tokenizer = byte_tokenizer()
    data = shuffled(seven_prompts)
    source = PromptSource(data, tokenizer)
    taken = []
    for count, restart in chunks:
        taken += source.take(count)
        if restart:
            saved = json.loads(json.dumps(source.state()))
            source = PromptSource(data, tokenizer)
            source.load_state(saved)
    assert taken == PromptSource(data, tokenizer).take(len(taken))


def test_a_saved_position_is_refused_with_other_prompts_shuffle_or_seed(tmp_path, seven_prompts, tokenizer):
    state = PromptSource(shuffled(seven_prompts), tokenizer).state()
    other = write_jsonl(tmp_path / "other.jsonl", [{"input": f"Prompt {n}", "label": str(n)} for n in range(7)])
    relabelled = write_jsonl(tmp_path / "relabelled.jsonl", [{"input": f"prompt {n}", "label": "1"} for n in range(7)])
    for path in (other, relabelled, f"{seven_prompts}@[:6]"):
        with pytest.raises(CheckpointError, match=r"--prompt-data .* not the 7 of the checkpoint"):
            PromptSource(shuffled(path), tokenizer).load_state(state)
    with pytest.raises(CheckpointError, match="--rollout-seed is 7, the checkpoint was saved with 42"):
        PromptSource(shuffled(seven_prompts, rollout_seed=7), tokenizer).load_state(state)
    with pytest.raises(CheckpointError, match="--rollout-shuffle is False"):
        PromptSource(DataConfig(prompt_data=seven_prompts, label_key="label"), tokenizer).load_state(state)
    with pytest.raises(CheckpointError, match="has no fingerprint"):
        PromptSource(shuffled(seven_prompts), tokenizer).load_state(
            {k: v for k, v in state.items() if k != "fingerprint"}
        )


def test_a_saved_position_is_accepted_from_the_same_prompts_under_another_path(tmp_path, seven_prompts, tokenizer):
    source = PromptSource(shuffled(seven_prompts), tokenizer)
    source.take(3)
    copy = write_jsonl(tmp_path / "copy.jsonl", [{"input": f"prompt {n}", "label": str(n)} for n in range(7)])
    resumed = PromptSource(shuffled(copy), tokenizer)
    resumed.load_state(source.state())
    assert resumed.take(9) == source.take(9)


def test_prompts_past_the_prompt_limit_are_dropped_and_counted(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"input": "abc"}, {"input": "abcd"}, {"input": "abcde"}])
    source = PromptSource(DataConfig(prompt_data=path, rollout_max_prompt_len=4), tokenizer)
    assert [prompt.text for prompt in source.take(3)] == ["abc", "abcd", "abc"]
    assert source.summary.notes == (f"{path}: 1 of 3 prompts dropped by --rollout-max-prompt-len 4",)


def test_a_limit_that_drops_every_prompt_is_an_error_with_the_shortest_length(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"input": "abc"}, {"input": "abcd"}])
    with pytest.raises(
        DataError, match=r"--rollout-max-prompt-len 2 drops all 2 prompts \(the shortest has 3 tokens\)"
    ):
        PromptSource(DataConfig(prompt_data=path, rollout_max_prompt_len=2), tokenizer)


def test_missing_options_columns_and_prompts_are_reported(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"inputs": "abc", "metadata": "m", "empty": ""}])
    with pytest.raises(ConfigError, match="--prompt-data is missing"):
        PromptSource(DataConfig(), tokenizer)
    with pytest.raises(
        DataError, match=r"rows\.jsonl, line 1: no key 'input' \(--input-key\); .*did you mean 'inputs'\?"
    ):
        PromptSource(DataConfig(prompt_data=path), tokenizer)
    with pytest.raises(DataError, match=r"line 1: no key 'answer' \(--label-key\)"):
        PromptSource(DataConfig(prompt_data=path, input_key="inputs", label_key="answer"), tokenizer)
    with pytest.raises(DataError, match=r"line 1: --metadata-key metadata is a string; expected an object"):
        PromptSource(DataConfig(prompt_data=path, input_key="inputs"), tokenizer)
    with pytest.raises(DataError, match=r"line 1: the prompt is empty"):
        PromptSource(DataConfig(prompt_data=path, input_key="empty"), tokenizer)


def test_fine_tuning_on_a_conversation_trains_on_its_last_answer(tmp_path, tokenizer):
    turns = [("user", "1+1?"), ("assistant", "2"), ("user", "2+2?"), ("assistant", "4")]
    rows = [{"input": [{"role": role, "content": text} for role, text in turns]}]
    data = DataConfig(prompt_data=write_jsonl(tmp_path / "rows.jsonl", rows), apply_chat_template=True)
    [prompt] = PromptSource(data, tokenizer, is_sft=True).take(1)
    assert prompt.text.endswith(f"2{EOS}\n<|im_start|>user\n2+2?{EOS}\n<|im_start|>assistant\n")
    assert tokenizer.decode(prompt.tokens) == prompt.text
    assert tokenizer.decode(prompt.response_tokens) == f"4{EOS}"


@pytest.mark.parametrize("template", [False, True])
def test_fine_tuning_on_a_prompt_and_a_response_column_ends_with_end_of_sequence(tmp_path, tokenizer, template):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"input": "1+1=", "answer": "2"}])
    data = DataConfig(prompt_data=path, label_key="answer", apply_chat_template=template)
    [prompt] = PromptSource(data, tokenizer, is_sft=True).take(1)
    assert prompt.text == (f"<|im_start|>user\n1+1={EOS}\n<|im_start|>assistant\n" if template else "1+1=")
    assert tokenizer.decode(prompt.response_tokens) == f"2{EOS}"


def test_fine_tuning_without_any_response_is_an_error(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"input": "1+1=", "answer": ""}])
    for key in (None, "answer"):
        with pytest.raises(DataError, match=r"line 1: no response to train on; .*--label-key"):
            PromptSource(DataConfig(prompt_data=path, label_key=key), tokenizer, is_sft=True)


def test_prompts_of_a_rollout_carry_no_response(seven_prompts, tokenizer):
    assert PromptSource(shuffled(seven_prompts), tokenizer).take(1)[0].response_tokens is None


def test_an_evaluation_set_has_its_own_keys_keeps_every_prompt_and_its_order(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "eval.jsonl", [{"q": "abc", "a": 1.5}, {"q": "abcdef", "a": "x"}])
    data = DataConfig(prompt_data="unused", label_key="label", rollout_shuffle=True, rollout_max_prompt_len=3)
    config = Config(data=data, evaluation=EvaluationConfig(eval_input_key="q", eval_label_key="a"))
    prompts, summary = read_eval_set("small", path, config, tokenizer)
    assert str(summary) == "2 prompts, 3 to 6 tokens (median 4), labels in all"
    assert [(prompt.index, prompt.text, prompt.label) for prompt in prompts] == [(0, "abc", "1.5"), (1, "abcdef", "x")]


def test_an_evaluation_set_falls_back_to_the_training_keys_and_errors_name_the_set(seven_prompts, tokenizer):
    data = DataConfig(label_key="label")
    assert read_eval_set("seven", seven_prompts, Config(data=data), tokenizer)[0][6].label == "6"
    other = Config(data=data, evaluation=EvaluationConfig(eval_input_key="q"))
    with pytest.raises(DataError, match=r"--eval-prompt-data seven: .*line 1: no key 'q' \(--eval-input-key\)"):
        read_eval_set("seven", seven_prompts, other, tokenizer)


def test_many_rows_come_through_in_order(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"input": f"p{n}"} for n in range(4500)])
    prompts = PromptSource(DataConfig(prompt_data=path), tokenizer).take(4500)
    assert [prompt.text for prompt in prompts] == [f"p{n}" for n in range(4500)]
