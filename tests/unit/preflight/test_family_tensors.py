"""The expected tensors of every family are those that transformers writes.

(test_scripts.py has the published sizes.)
"""

from __future__ import annotations

import pytest
from model_families import FAMILIES, OF_TRANSFORMERS, SHAPE, save_model

from slime_opd.config.families import SUPPORTED
from slime_opd.config.hf_config import read_hf_config
from slime_opd.errors import CheckpointError
from slime_opd.preflight.family_tensors import expected_tensors, may_be_extra
from slime_opd.preflight.hf_weights import weight_problems
from slime_opd.preflight.safetensors_header import read_header


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_transformers_writes_has_exactly_the_expected_tensors(tmp_path, family):
    save_model(tmp_path, family)
    config = read_hf_config(str(tmp_path))
    found = {name: info.shape for name, info in read_header(tmp_path / "model.safetensors").items()}
    assert config["model_type"] in SUPPORTED
    assert expected_tensors(config) == found
    assert weight_problems(tmp_path)[0] == []


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Qwen3", {"attention_bias": True, "head_dim": 24}),
        ("Qwen3Moe", {"attention_bias": True, "num_experts": 3, "moe_intermediate_size": 40, "mlp_only_layers": [0]}),
        ("Qwen3Moe", {"num_experts": 3, "moe_intermediate_size": 40, "decoder_sparse_step": 2}),
        (
            "DeepseekV3",
            {"attention_bias": True, "n_routed_experts": 4, "first_k_dense_replace": 2, "num_key_value_heads": 4},
        ),
        ("Glm4", {"attention_bias": False, "head_dim": 16}),
    ],
)
def test_what_a_config_adds_or_leaves_out_is_followed(name, more):
    import torch
    import transformers

    config = getattr(transformers, f"{name}Config")(**SHAPE | more)
    with torch.device("meta"):
        model = getattr(transformers, f"{OF_TRANSFORMERS.get(name, name)}ForCausalLM")(config)
    state = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert expected_tensors(config.to_dict()) == state


def test_a_config_that_lacks_a_number_is_named():
    with pytest.raises(CheckpointError, match="it has no hidden_size"):
        expected_tensors({"model_type": "llama"})


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": 10**8}, {"num_experts": 10**8}, {"num_experts": 10**5, "num_hidden_layers": 1000}]
)
def test_a_config_of_millions_of_tensors_is_refused_at_once(change):
    config = SHAPE | {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 8} | change
    with pytest.raises(CheckpointError, match="cannot be meant"):
        expected_tensors(config)


@pytest.mark.parametrize(
    ("name", "may"),
    [
        ("model.layers.2.self_attn.q_proj.weight", True),  # a layer for multi-token prediction
        ("model.mtp_layers.0.token_layernorm.weight", True),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", True),
        ("model.layers.0.mlp.down_proj.weight_scale_inv", True),
        ("lm_head.weight", False),
        ("model.layers.1.self_attn.new.weight", False),
    ],
)
def test_what_may_be_in_the_files_beside(name, may):
    assert may_be_extra(name, {"num_hidden_layers": 2, "tie_word_embeddings": False}) is may
    assert may_be_extra("lm_head.weight", {"num_hidden_layers": 2, "tie_word_embeddings": True})
