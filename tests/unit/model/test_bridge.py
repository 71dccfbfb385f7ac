"""The adapter around mbridge: it fits the installed mbridge, and nothing else touches mbridge's private parts."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
import torch
import transformers
from mbridge.core import LLMBridge
from mbridge.core.bridge import Bridge
from model_families import FAMILIES, OF_TRANSFORMERS, SHAPE

from slime_opd.config import parse
from slime_opd.model.bridge import make_bridge

PACKAGE = Path(__file__).parents[3] / "slime_opd"
# mbridge's private methods that the adapter calls, with the arguments of its calls.
METHODS = {
    "_get_gptmodel_args": {},
    "_weight_name_mapping_mcore_local_to_global": {"model": None, "consider_ep": False},
    "_weight_name_mapping_mcore_to_hf": {"mcore_weights_name": ""},
    "_weight_to_mcore_format": {"mcore_weights_name": "", "hf_weights": []},
    "_weight_to_hf_format": {"mcore_weights_name": "", "mcore_weights": None},
    "_weight_split_across_tp": {"mcore_weights_name": "", "mcore_weights": None, "param": None, "tp_split_size": 1},
}
TABLES = ("_DIRECT_MAPPING", "_MLP_MAPPING", "_ATTENTION_MAPPING")
# What the files of families/ override or build on.
EXTENSION_POINTS = {"_build_config", "_build_base_config", "_get_gptmodel_args", "_ATTENTION_MAPPING", "_MLP_MAPPING"}


@pytest.mark.parametrize("name", METHODS)
def test_mbridge_has_the_private_method_and_takes_the_arguments(name):
    inspect.signature(getattr(LLMBridge, name)).bind(None, **METHODS[name])


def test_mbridge_has_the_private_tables_and_extension_points():
    assert all(isinstance(getattr(Bridge, name), dict) for name in TABLES)
    assert all(hasattr(LLMBridge, name) for name in EXTENSION_POINTS)


def private_names(source: str) -> set[str]:
    """Private attributes of mbridge that a program reads, calls or defines."""
    of_mbridge = {name for name in dir(LLMBridge) if name.startswith("_") and not name.startswith(("__", "_abc"))}
    nodes = list(ast.walk(ast.parse(source)))
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    names |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    names |= {node.id for node in nodes if isinstance(node, ast.Name)}
    return names & of_mbridge


def test_only_the_adapter_and_the_families_touch_private_parts_of_mbridge():
    used = {file.relative_to(PACKAGE).as_posix(): private_names(file.read_text()) for file in PACKAGE.rglob("*.py")}
    assert used.pop("model/bridge.py") == {*METHODS, "_DIRECT_MAPPING", "_MLP_MAPPING"}
    in_families = {name for file, names in used.items() if file.startswith("model/families/") for name in names}
    assert in_families == EXTENSION_POINTS
    assert {file for file, names in used.items() if names and not file.startswith("model/families/")} == set()


def test_a_use_of_a_private_part_would_be_detected():
    assert private_names("bridge._weight_to_hf_format(name, weight)") == {"_weight_to_hf_format"}


def bridge_of(path, family: str = "Qwen3", **more):
    name, options = FAMILIES[family]
    config = getattr(transformers, f"{OF_TRANSFORMERS.get(name, name)}Config")(**SHAPE | options | more)
    config.save_pretrained(path)
    return make_bridge(parse(["--megatron-to-hf-mode", "bridge", "--hf-checkpoint", str(path)]), is_unsplit=True)


@pytest.mark.parametrize("rows", [-8, 0, 8])
def test_vocabulary_weights_of_any_number_of_rows_become_the_students_and_its_padding_is_zero(tmp_path, rows):
    bridge = bridge_of(tmp_path, vocab_size=160, tie_word_embeddings=False)
    assert (bridge.vocab_size, bridge.padded_vocab_size) == (160, 256)
    weight = torch.arange(1.0, 160 + rows + 1)[:, None].expand(-1, 64).contiguous()
    made = bridge.to_megatron("output_layer.weight", [weight])
    expected = torch.zeros(256, 64)
    expected[: min(160, 160 + rows)] = weight[:160]
    assert made.equal(expected)
    ((name, back),) = bridge.to_hugging_face("output_layer.weight", made)
    assert name == "lm_head.weight" and back.equal(expected[:160])


@pytest.mark.parametrize("is_tied", [False, True])
def test_the_output_layer_of_a_tied_model_is_its_embedding_and_other_models_keep_theirs(tmp_path, is_tied):
    for tied in (is_tied, not is_tied):
        bridge = bridge_of(tmp_path, tie_word_embeddings=tied)
        assert bridge.is_tied is tied
        expected = "model.embed_tokens.weight" if tied else "lm_head.weight"
        assert bridge.hf_names("output_layer.weight") == [expected]


@pytest.mark.parametrize(
    ("family", "name", "expected"),
    [
        ("Qwen3", "input_layernorm.weight", "input_layernorm.weight"),
        ("Qwen3", "self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        ("Qwen3", "pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
        ("DeepSeek-V3", "self_attention.q_layernorm.weight", "self_attn.q_a_layernorm.weight"),
        ("DeepSeek-V3", "pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
    ],
)
def test_norms_have_one_hugging_face_name_whether_they_are_fused_into_a_linear_layer_or_not(
    tmp_path, family, name, expected
):
    assert bridge_of(tmp_path, family).hf_names(f"decoder.layers.1.{name}") == [f"model.layers.1.{expected}"]
