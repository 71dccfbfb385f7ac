"""Sizes in tokens that cannot be meant."""

import json

import pytest

from slime_opd.config import parse
from slime_opd.preflight.check_lengths import check_lengths, context_length


def run(tmp_path, *flags, **model):
    (tmp_path / "config.json").write_text(json.dumps(model))
    return parse(["--hf-checkpoint", str(tmp_path), *flags])


def test_a_response_longer_than_the_context_is_refused_with_both_numbers_and_the_file(tmp_path):
    config = run(tmp_path, "--rollout-max-response-len", "100000", max_position_embeddings=128)
    assert check_lengths(config) == [
        f"--rollout-max-response-len: found 100000, expected at most the 128 tokens that prompt and response share ({tmp_path}/config.json (max_position_embeddings))"
    ]
    assert check_lengths(run(tmp_path, "--rollout-max-response-len", "128", max_position_embeddings=128)) == []
    assert check_lengths(run(tmp_path, "--rollout-max-response-len", "128")) == []


def test_the_response_of_evaluation_is_held_against_the_context_of_the_flag(tmp_path):
    config = run(
        tmp_path, "--eval-max-response-len", "90", "--rollout-max-context-len", "64", max_position_embeddings=128
    )
    [problem] = check_lengths(config)
    assert problem.startswith("--eval-max-response-len: found 90, expected at most the 64 tokens")
    assert problem.endswith("(--rollout-max-context-len)")


def test_a_context_beyond_the_models_is_refused_unless_the_engines_have_it(tmp_path):
    [problem] = check_lengths(run(tmp_path, "--rollout-max-context-len", "256", max_position_embeddings=128))
    assert problem.startswith("--rollout-max-context-len: found 256, expected at most the 128 tokens")
    longer = ("--rollout-max-context-len", "256", "--sglang-context-length", "256")
    assert check_lengths(run(tmp_path, *longer, max_position_embeddings=128)) == []


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "linear", "factor": 4.0}, 512),
        ({"rope_type": "llama3", "factor": 8.0}, 128),
        (None, 128),
    ],
)
def test_the_context_of_a_scaled_model_is_the_one_that_the_engine_derives(tmp_path, scaling, expected):
    assert context_length(run(tmp_path, max_position_embeddings=128, rope_scaling=scaling)) == expected


def test_a_config_that_is_no_json_is_left_to_the_check_that_reports_it(tmp_path):
    config = run(tmp_path, "--rollout-max-response-len", "9")
    (tmp_path / "config.json").write_text("{")
    assert check_lengths(config) == []
