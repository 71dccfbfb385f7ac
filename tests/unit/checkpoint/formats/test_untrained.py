"""Weights that the trained model does not have: copied, ignored, or a reason to refuse the directory."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from slime_opd.checkpoint.formats.hf_reader import WeightReader
from slime_opd.checkpoint.formats.hf_writer import WeightGroup
from slime_opd.checkpoint.formats.untrained import check_all_used, untrained_weights
from slime_opd.errors import CheckpointError

WEIGHTS = {f"model.layers.{n}.weight": torch.arange(16.0).reshape(4, 4) + n for n in range(5)}


def groups(weights=WEIGHTS) -> list[WeightGroup]:
    return [WeightGroup({name: (tuple(w.shape), w.dtype)}, dict) for name, w in weights.items()]


def layers(number: int, **more) -> SimpleNamespace:
    return SimpleNamespace(num_hidden_layers=number, **{"tie_word_embeddings": False} | more)


def test_layers_for_multi_token_prediction_are_copied(tmp_path):
    save_file({**WEIGHTS, "model.mtp_layers.0.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    trained = groups({name: w for name, w in WEIGHTS.items() if "layers.4" not in name})
    copied = untrained_weights(str(tmp_path), trained, layers(4))
    read = {name: w for group in copied for name, w in group.read().items()}
    assert sorted(read) == ["model.layers.4.weight", "model.mtp_layers.0.weight"]
    assert read["model.layers.4.weight"].equal(WEIGHTS["model.layers.4.weight"])
    assert untrained_weights(str(tmp_path), trained, layers(4, quantization_config={"quant_method": "fp8"})) == []


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({**WEIGHTS, "model.norm.weight": torch.ones(4)}, "the checkpoint lacks model.norm.weight"),
        (
            WEIGHTS | {"model.layers.0.weight": torch.ones(2, 4)},
            r"model.layers.0.weight is \[2, 4\] there and \[4, 4\]",
        ),
    ],
)
def test_an_origin_of_another_model_is_refused(tmp_path, weights, expected):
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"--origin-hf-dir .* is of another model: {expected}"):
        untrained_weights(str(tmp_path), groups(), layers(9))


def test_a_tied_output_layer_of_the_origin_is_not_copied(tmp_path):
    save_file({**WEIGHTS, "lm_head.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    assert untrained_weights(str(tmp_path), groups(), layers(9, tie_word_embeddings=True)) == []


def test_an_origin_without_weights_has_none_to_copy(tmp_path):
    assert untrained_weights(str(tmp_path), groups(), layers(4)) == []


def test_a_weight_that_would_be_lost_is_refused_and_scales_are_not_missed(tmp_path):
    save_file({"a": torch.ones(2), "a_scale_inv": torch.ones(1)}, tmp_path / "model.safetensors")
    check_all_used(WeightReader(tmp_path), {"a"}, str(tmp_path), layers(4))
    with pytest.raises(CheckpointError, match=r"has 1 weights that its config\.json does not describe, first a:"):
        check_all_used(WeightReader(tmp_path), set(), str(tmp_path), layers(4))
    with pytest.raises(CheckpointError, match=r"lacks 1 of the weights that its config\.json describes, first b"):
        check_all_used(WeightReader(tmp_path), {"a", "b"}, str(tmp_path), layers(4))
