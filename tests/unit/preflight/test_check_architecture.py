"""Flags are compared with the architecture of --hf-checkpoint."""

import json

import pytest

from slime_opd.config import parse
from slime_opd.preflight import check_architecture
from slime_opd.preflight.rules import problems


@pytest.fixture
def student(tmp_path):
    directory = tmp_path / "student"
    directory.mkdir()
    architecture = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    (directory / "config.json").write_text(json.dumps(architecture))
    return directory


def test_the_layout_must_divide_the_checkpoints_architecture(student):
    arguments = f"--megatron-to-hf-mode bridge --hf-checkpoint {student} --pipeline-model-parallel-size 3".split()
    assert check_architecture.check_layout_of_checkpoint(parse([*arguments, "--tensor-model-parallel-size", "4"])) == [
        "--tensor-model-parallel-size 4 does not divide the model's 2 key-value heads (query groups)",
        "--pipeline-model-parallel-size 3 does not divide the model's 4 layers; --decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers give the ends others",
    ]
    assert check_architecture.check_layout_of_checkpoint(parse(arguments[:4])) == []
    ends = ["--decoder-first-pipeline-num-layers", "1", "--decoder-last-pipeline-num-layers", "1"]
    assert check_architecture.check_layout_of_checkpoint(parse([*arguments, *ends])) == []
    (student / "config.json").write_text("{")
    assert check_architecture.check_layout_of_checkpoint(parse(arguments)) == []
    assert check_architecture.check_hf_config(parse(arguments)) == [
        f"--hf-checkpoint: {student}/config.json is not JSON"
    ]


@pytest.mark.parametrize("entry", ["rope_scaling", "rope_parameters"])
def test_rotary_flags_are_compared_with_what_transformers_4_and_5_write(student, entry):
    rotary = {"rope_type": "llama3", "factor": 32.0}
    config = {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": rotary}
    if entry == "rope_parameters":
        config = {"model_type": "llama", "rope_parameters": rotary | {"rope_theta": 5e5}}
    (student / "config.json").write_text(json.dumps(config))
    arguments = f"--hf-checkpoint {student} --use-rope-scaling --rotary-scaling-factor 8 --rotary-base 10000".split()
    found = check_architecture.check_architecture_flags(parse(arguments))
    assert sorted(problem.partition(":")[0] for problem in found) == ["--rotary-base", "--rotary-scaling-factor"]


MIXTURE = {"model_type": "qwen3_moe", "num_experts": 6, "num_hidden_layers": 4}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            "--tensor-model-parallel-size 2",
            "--tensor-model-parallel-size 2 with a mixture of experts: add --sequence-parallel",
        ),
        (
            "--expert-model-parallel-size 4",
            "--expert-model-parallel-size: found 4, expected a divisor of the 6 experts",
        ),
        ("--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 3", None),
    ],
)
def test_layouts_that_a_mixture_cannot_be_trained_at(student, arguments, expected):
    (student / "config.json").write_text(json.dumps(MIXTURE))
    found = check_architecture.check_mixture(parse(["--hf-checkpoint", str(student), *arguments.split()]))
    assert [problem.startswith(expected) for problem in found] == [True] if expected else found == []


def test_a_model_without_experts_has_none_to_share(student):
    (problem,) = check_architecture.check_mixture(
        parse(["--hf-checkpoint", str(student), "--expert-model-parallel-size", "2"])
    )
    assert problem == "--expert-model-parallel-size: found 2, expected 1: the model has no experts to share"
    assert check_architecture.check_mixture(parse(["--expert-model-parallel-size", "2"])) == []


def test_a_top_k_larger_than_the_vocabulary_is_refused(student):
    arguments = ["--hf-checkpoint", str(student), "--opd-log-prob-top-k"]
    assert check_architecture.check_top_k_of_vocabulary(parse([*arguments, "64"])) == []
    (problem,) = check_architecture.check_top_k_of_vocabulary(parse([*arguments, "65"]))
    assert problem.startswith("--opd-log-prob-top-k: found 65, expected at most the vocabulary's 64 tokens")
    assert check_architecture.check_top_k_of_vocabulary(parse(["--opd-log-prob-top-k", "65"])) == []


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "gemma3"}, "model_type 'gemma3' is not supported (Megatron-core has no layers with two rotary"),
        ({"model_type": "qwen3_next"}, "model_type 'qwen3_next' is not supported (Megatron-core's gated delta net"),
        ({"model_type": "qwen3_5", "text_config": {"model_type": "qwen3_5_text"}}, "'qwen3_5' is not supported (Meg"),
        ({"model_type": "new_one"}, "model_type 'new_one' is not supported; supported are deepseek_v3, glm4, "),
        ({"hidden_size": 64}, "its config.json has no model_type; supported are deepseek_v3"),
        ([], "config.json is not a JSON object"),
        (
            {"model_type": "llama", "hidden_size": "64"},
            'config.json: hidden_size is "64", expected a whole number from 1',
        ),
        ({"model_type": "llama", "vocab_size": 10**12}, "vocab_size is 1000000000000, expected a whole number"),
        ({"model_type": "llama", "rope_scaling": [1]}, "rope_scaling is [1], expected an object"),
        ({"model_type": "llama", "rope_theta": float("nan")}, "rope_theta is NaN, expected a finite number"),
        ({"model_type": "llama", "text_config": {"head_dim": 0}}, "text_config.head_dim is 0, expected"),
    ],
)
def test_a_config_of_another_family_or_with_wrong_values_is_refused_in_a_sentence(student, config, sentence):
    (student / "config.json").write_text(json.dumps(config))
    options = parse(["--hf-checkpoint", str(student)])
    (problem,) = check_architecture.check_hf_config(options)
    assert sentence in problem
    assert all(isinstance(line, str) for line in problems(options))


def test_a_supported_family_and_an_absent_config_are_no_problem(student):
    (student / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    assert check_architecture.check_hf_config(parse(["--hf-checkpoint", str(student)])) == []
    assert check_architecture.check_hf_config(parse(["--hf-checkpoint", str(student / "absent")])) == []


LLAMA_3 = {
    "model_type": "llama", "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 32,
    "vocab_size": 64, "rms_norm_eps": 1e-5, "rope_theta": 500000, "tie_word_embeddings": True,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
}  # fmt: skip
ITS_FLAGS = "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --vocab-size 64 --norm-epsilon 1e-5 --rotary-base 500000 --use-rope-scaling"


def test_flags_that_describe_the_checkpoint_are_no_problem(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3))
    arguments = ["--hf-checkpoint", str(tmp_path), *ITS_FLAGS.split()]
    assert check_architecture.check_architecture_flags(parse(arguments)) == []
    # In bridge mode the flags are not read.
    bridge = ["--hf-checkpoint", str(tmp_path), "--megatron-to-hf-mode", "bridge"]
    assert check_architecture.check_architecture_flags(parse(bridge)) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("--num-layers 4", "--num-layers 5"), "--num-layers: found 5, but"),
        (("--rotary-base 500000", "--rotary-base 10000"), "has rope_theta 500000"),
        (("--use-rope-scaling", ""), "--use-rope-scaling is missing, but"),
        (("--use-rope-scaling", "--use-rope-scaling --rotary-scaling-factor 32"), "has rope_scaling.factor 8.0"),
        (("--hidden-size 32", "--hidden-size 32 --qk-layernorm"), "--qk-layernorm is set, but"),
        (("--vocab-size 64", "--vocab-size 64 --add-qkv-bias"), "has model_type llama: drop it"),
        (
            ("--vocab-size 64", "--vocab-size 64 --untie-embeddings-and-output-weights"),
            "tie_word_embeddings true: drop it",
        ),
    ],
)
def test_flags_of_another_model_are_named_with_what_the_checkpoint_has(change, sentence, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3))
    arguments = ["--hf-checkpoint", str(tmp_path), *ITS_FLAGS.replace(*change).split()]
    (problem,) = check_architecture.check_architecture_flags(parse(arguments))
    assert sentence in problem
