"""Labels, and the figures of a file."""

import json

import pytest
from byte_tokenizer import byte_tokenizer

from slime_opd.config import parse
from slime_opd.data.columns import Columns, evaluation_columns, training_columns
from slime_opd.data.reader import Row
from slime_opd.data.source import PromptSource
from slime_opd.errors import DataError

FREE = Columns("input", "label", "metadata")
COMPARED = Columns("input", "label", "metadata", label_user="--rm-type math")


def label(value, columns=FREE):
    return columns.label(Row("f.jsonl, line 7", {"label": value}))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("4", "4"),
        (4, "4"),
        (0.5, "0.5"),
        (True, "true"),
        (None, None),
        ([1, "é"], '[1, "é"]'),
        ({"a": 1}, '{"a": 1}'),
        ("", ""),
    ],
)
def test_labels_are_text_and_a_custom_reward_may_have_any(value, expected):
    assert label(value) == expected


@pytest.mark.parametrize(
    ("value", "state"),
    [(None, "is null"), ("", "is empty"), (" \n", "is empty"), ([1], "is a list"), ({"a": 1}, "is an object")],
)
def test_a_built_in_reward_needs_one_answer_in_every_row(value, state):
    with pytest.raises(DataError) as caught:
        label(value, COMPARED)
    assert str(caught.value).startswith(
        f"f.jsonl, line 7: the label (--label-key label) {state}, and --rm-type math compares with"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800"])
def test_values_that_cannot_be_labels_are_refused(value):
    with pytest.raises(DataError, match=r"f\.jsonl, line 7: the label \(--label-key label\)"):
        label(value)


def test_a_missing_label_names_the_row_the_flag_and_the_keys():
    with pytest.raises(DataError, match=r"f\.jsonl, line 7: no key 'label' \(--label-key\); present are labels"):
        FREE.label(Row("f.jsonl, line 7", {"labels": 1}))


def test_the_rewards_decide_whether_labels_are_checked():
    base = ["--prompt-data", "f", "--label-key", "l"]
    users = {
        (): (None, "the reward math"),
        ("--rm-type", "exact_match"): ("--rm-type exact_match", "the reward exact_match"),
        ("--custom-rm-path", "a.b"): (None, None),
        ("--custom-rm-path", "a.b", "--eval-rm-type", "math"): (None, "the reward math"),
        ("--rm-type", "math", "--loss-type", "sft_loss"): (None, "the reward math"),
    }
    for flags, expected in users.items():
        config = parse([*base, *flags])
        assert (training_columns(config).label_user, evaluation_columns(config).label_user) == expected


def test_keys_of_evaluation_are_named_by_the_flag_that_set_them():
    own = evaluation_columns(parse(["--label-key", "l", "--eval-input-key", "q"]))
    assert (own.input_key, own.input_flag, own.label_key, own.label_flag) == (
        "q",
        "--eval-input-key",
        "l",
        "--label-key",
    )


def test_the_summary_of_a_file_counts_duplicates_and_contradicting_labels(tmp_path):
    rows = [{"input": "1+1=", "label": "2"}] * 3 + [{"input": "1+1=", "label": "3"}, {"input": "11+1=", "label": None}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    config = parse(["--prompt-data", str(path), "--label-key", "label"])
    summary = PromptSource.of_run(config, byte_tokenizer()).summary
    assert str(summary) == (
        "5 prompts, 4 to 5 tokens (median 4), labels in 4, 2 duplicates, 1 repeated prompt with another label or response"
    )
