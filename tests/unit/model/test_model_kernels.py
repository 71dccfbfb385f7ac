"""The configuration of a model follows the kernels of a described machine."""

import json

import pytest
import transformers
from megatron.core.models.common.embeddings import rope_utils
from model_families import FAMILIES, OF_TRANSFORMERS, SHAPE

from slime_opd.config import parse
from slime_opd.config.kernels import Machine
from slime_opd.errors import ConfigError
from slime_opd.model import transformer_config
from slime_opd.model.bridge import ModelBridge, make_bridge

H100_TE = Machine(has_cuda=True, compute_capability=(9, 0), engine="2.11.0")
# Latent attention's fused kernel takes powers of two, which the tiny models' 24 is not; GLM-4's pairs are interleaved.
UNFUSED = ("GLM-4", "DeepSeek-V3", "Moonlight")


@pytest.fixture
def simulate(monkeypatch):
    """Sets the machine that the model is built for; its CUDA and Transformer Engine need not exist."""
    # Megatron refuses the fusion where it finds no kernel.
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", object())

    def on(machine: Machine) -> None:
        monkeypatch.setattr(transformer_config.machine, "of_this_process", lambda: machine)

    return on


def directory_of(family: str, path, **more) -> str:
    name, options = FAMILIES[family]
    config = getattr(transformers, f"{OF_TRANSFORMERS.get(name, name)}Config")(**SHAPE | options | more)
    values = config.to_dict() | ({"model_type": name.lower()} if name in OF_TRANSFORMERS else {})
    (path / "config.json").write_text(json.dumps(values, default=str))
    return str(path)


def bridge_of(directory: str, *flags: str) -> ModelBridge:
    config = parse(["--megatron-to-hf-mode", "bridge", "--hf-checkpoint", directory, *flags])
    return make_bridge(config, is_unsplit=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rotation_is_fused_where_the_fused_kernel_is_right(family, simulate, tmp_path):
    simulate(H100_TE)
    assert bridge_of(directory_of(family, tmp_path)).config.apply_rope_fusion is (family not in UNFUSED)
    simulate(Machine())
    assert bridge_of(str(tmp_path)).config.apply_rope_fusion is False


def test_deepseeks_own_widths_are_rotated_by_the_fused_kernel(simulate, tmp_path):
    simulate(H100_TE)
    directory = directory_of("DeepSeek-V3", tmp_path, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    assert bridge_of(directory).config.apply_rope_fusion is True


@pytest.mark.parametrize("family", UNFUSED)
def test_a_requested_fusion_is_refused_where_it_is_wrong(family, simulate, tmp_path):
    simulate(H100_TE)
    with pytest.raises(ConfigError, match="--apply-rope-fusion: "):
        bridge_of(directory_of(family, tmp_path), "--apply-rope-fusion")


@pytest.mark.parametrize(
    ("family", "flags", "fused"),
    [
        ("Qwen3", "", True),
        ("Qwen3", "--no-rope-fusion", False),
        ("Qwen3", "--rotary-interleaved", False),
        ("Moonlight", "--multi-latent-attention --rope-type rope --kv-lora-rank 32", False),
        ("DeepSeek-V3", "--multi-latent-attention --rope-type yarn --kv-lora-rank 32", True),
    ],
)
def test_raw_mode_has_the_same_rules(family, flags, fused, simulate, tmp_path):
    simulate(H100_TE)
    flags = f"--hf-checkpoint {directory_of(family, tmp_path)} --num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --swiglu {flags}"
    config = parse(flags.split())
    assert transformer_config.config_from_flags(config).apply_rope_fusion is fused


def test_fused_operations_come_with_transformer_engines_layers(simulate, tmp_path):
    fusions = ("persist_layer_norm", "masked_softmax_fusion", "bias_activation_fusion", "bias_dropout_fusion")
    directory = directory_of("Qwen3", tmp_path)
    for machine in (H100_TE, Machine(), Machine(has_cuda=True, compute_capability=(9, 0))):
        simulate(machine)
        found = bridge_of(directory).config
        assert {getattr(found, name) for name in fusions} == {machine.engine is not None}


def test_the_flag_reaches_transformer_engine_where_its_attention_runs(simulate, tmp_path):
    directory = directory_of("Qwen3", tmp_path)
    simulate(H100_TE)
    assert bridge_of(directory, "--attention-backend", "fused").config.attention_backend.name == "fused"
    # Elsewhere Megatron's switches of Transformer Engine are left alone.
    simulate(Machine())
    assert bridge_of(directory, "--attention-backend", "fused").config.attention_backend.name == "auto"
    simulate(Machine(has_cuda=True, compute_capability=(9, 0)))
    with pytest.raises(ConfigError, match="--attention-backend fused"):
        bridge_of(directory, "--attention-backend", "fused")


def test_a_broken_transformer_engine_stops_the_model(simulate, tmp_path):
    simulate(Machine(has_cuda=True, compute_capability=(9, 0), engine="2.11.0", engine_error="OSError: no library"))
    directory = directory_of("Qwen3", tmp_path)
    with pytest.raises(ConfigError, match=r"cannot be imported \(OSError: no library\)"):
        bridge_of(directory)
    assert bridge_of(directory, "--attention-backend", "local").config.apply_rope_fusion is False
