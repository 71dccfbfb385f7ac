"""What is wrong with the weights of a Hugging Face directory is found in their headers."""

from __future__ import annotations

import shutil

import pytest
import torch
from damage import edit_config, edit_tensors, split_in_two, truncate, write_index
from model_families import save_model

from slime_opd.preflight.hf_weights import weight_problems

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def model(tiny_model_dir, tmp_path):
    """A copy of the tiny model, to be damaged."""
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def test_whole_weights_are_summarised(model):
    assert weight_problems(model) == ([], "25 tensors, 106,944 values in F32")
    split_in_two(model)
    assert weight_problems(model) == ([], "25 tensors, 106,944 values in F32")


def without(name):
    return lambda weights: {key: value for key, value in weights.items() if key != name}


DAMAGES = {
    "truncated": (truncate, "model.safetensors is truncated: its header describes 427,776 bytes"),
    "empty": (lambda d: truncate(d, 0), "model.safetensors is not a whole safetensors file: it has 0 bytes"),
    "garbage": (lambda d: (d / "model.safetensors").write_bytes(b"<html>" * 99), "does not start with a header"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "has no .safetensors file"),
    "only .bin": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        "has no .safetensors file, only .bin: convert it",
    ),
    "another width": (
        lambda d: edit_config(d, hidden_size=128),
        "weights have another shape than config.json describes: model.embed_tokens.weight is [64, 64], expected [64, 128];",
    ),
    "another vocabulary": (
        lambda d: edit_config(d, vocab_size=63),
        "model.embed_tokens.weight is [64, 64], expected [63, 64]",
    ),
    "other heads": (lambda d: edit_config(d, num_attention_heads=2), "q_proj.weight is [128, 64], expected [64, 64]"),
    "more layers": (
        lambda d: edit_config(d, num_hidden_layers=3),
        "lacks 11 weights (model.layers.2.input_layernorm.weight, model.layers.2.post_attention_layernorm.weight, model.layers.2.self_attn.q_proj.weight, …) that config.json describes",
    ),
    "another family": (lambda d: edit_config(d, model_type="qwen2"), "that config.json does not describe"),
    "not supported": (lambda d: edit_config(d, model_type="gemma3"), "model_type 'gemma3' is not supported"),
    "no head": (
        lambda d: edit_tensors(d, without("lm_head.weight")),
        "lacks 1 weight (lm_head.weight) that config.json describes (is tie_word_embeddings true for this model?)",
    ),
    "a weight less": (lambda d: edit_tensors(d, without(Q)), f"lacks 1 weight ({Q}) that config.json describes"),
    "a weight more": (
        lambda d: edit_tensors(d, lambda weights: weights | {"model.new.weight": torch.zeros(1)}),
        "has 1 weight (model.new.weight) that config.json does not describe",
    ),
    "quantised": (
        lambda d: (
            edit_config(d, quantization_config={"quant_method": "awq"}),
            edit_tensors(d, lambda weights: without(Q)(weights) | {Q.replace("weight", "qweight"): torch.zeros(1)}),
        ),
        "(it is quantised by awq, which is not supported)",
    ),
    "fp8 of a family that is not read in it": (
        lambda d: edit_tensors(d, lambda weights: weights | {Q: weights[Q].to(torch.float8_e4m3fn)}),
        f"1 weight ({Q}) is in F8_E4M3: weights in fp8 are read for deepseek_v3 alone",
    ),
    "integers": (
        lambda d: edit_tensors(d, lambda weights: weights | {Q: weights[Q].to(torch.int8)}),
        f"1 weight ({Q}) is in I8, expected one of F64, F32, F16, BF16",
    ),
    "an index that is not JSON": (
        lambda d: (d / "model.safetensors.index.json").write_text("{"),
        "model.safetensors.index.json is not JSON",
    ),
    "an index of nothing": (lambda d: write_index(d, {}), "has no weight_map of tensors to files"),
    "an index to elsewhere": (
        lambda d: write_index(d, {"a": "../../etc/passwd"}),
        "its weight_map names something that is not a file of this directory",
    ),
    "config without a size": (
        lambda d: edit_config(d, intermediate_size=None),
        "config.json: it has no intermediate_size",
    ),
    "config of text": (lambda d: (d / "config.json").write_text("text"), "config.json is not JSON"),
    "no config": (lambda d: (d / "config.json").unlink(), "has no config.json"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_sentence_that_names_what_it_is(model, name):
    damage, sentence = DAMAGES[name]
    damage(model)
    problems, _ = weight_problems(model)
    assert any(sentence in problem for problem in problems), problems
    assert all("\n" not in problem and len(problem) < 500 for problem in problems)


FIRST, SHARD = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda d, names: (d / SHARD).unlink(), f"names 1 file ({SHARD}) that is not there: is the download complete?"),
        (
            lambda d, names: write_index(d, names | {"ghost": SHARD}),
            "names 1 tensor (ghost) that the file beside it does not",
        ),
        (lambda d, names: write_index(d, without(Q)(names)), f"does not name 1 tensor ({Q}) that the files have"),
        (lambda d, names: (d / SHARD).write_bytes(b""), f"{SHARD} is not a whole safetensors file: it has 0 bytes"),
        (lambda d, names: shutil.copy(d / SHARD, d / FIRST), f"in both {FIRST} and {SHARD}"),
    ],
    ids=["shard gone", "tensor not in its shard", "tensor not in the index", "empty shard", "twice"],
)
def test_an_index_and_its_shards_are_compared(model, damage, sentence):
    names = split_in_two(model)
    damage(model, names)
    problems, _ = weight_problems(model)
    assert any(sentence in problem for problem in problems), problems


def test_tied_embeddings_may_or_may_not_have_a_head(model):
    edit_config(model, tie_word_embeddings=True)
    assert weight_problems(model)[0] == []
    edit_tensors(model, without("lm_head.weight"))
    assert weight_problems(model)[0] == []


def test_fp8_weights_of_deepseek_need_the_scales_of_their_blocks(tmp_path):
    save_model(tmp_path, "DeepSeek-V3")
    name = "model.layers.0.mlp.down_proj.weight"

    def in_fp8(weights, scales):
        return weights | {name: weights[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(scales)}

    edit_tensors(tmp_path, lambda weights: in_fp8(weights, (1, 1)))  # a weight of [64, 128]
    assert weight_problems(tmp_path)[0] == []
    edit_tensors(tmp_path, lambda weights: weights | {f"{name}_scale_inv": torch.ones(1, 2)})
    assert "in fp8 is without a NAME_scale_inv" in weight_problems(tmp_path)[0][0]
