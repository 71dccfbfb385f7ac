"""Merged tensor-parallel shards equal the parameter that mbridge split."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from mbridge.core.bridge import Bridge

from slime_opd.weights.gathered_weights import merge_shards

# Name, the axis that Megatron marks, and whether the first matrix of an MLP holds a gate.
CASES = {
    "an embedding": ("embedding.word_embeddings.weight", 0, True),
    "queries, keys and values": ("decoder.layers.0.self_attention.linear_qkv.weight", 0, True),
    "an output projection": ("decoder.layers.0.self_attention.linear_proj.weight", 1, True),
    "a gated MLP": ("decoder.layers.0.mlp.linear_fc1.weight", 0, True),
    "an MLP without a gate": ("decoder.layers.0.mlp.linear_fc1.weight", 0, False),
    "a shared expert": ("decoder.layers.0.mlp.shared_experts.linear_fc1.weight", 0, True),
    "an expert's first matrix": ("decoder.layers.0.mlp.experts.linear_fc1.weight3", None, True),
    "an expert's second matrix": ("decoder.layers.0.mlp.experts.linear_fc2.weight3", None, True),
}


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_merged_shards_equal_the_parameter_that_mbridge_split(case, ranks):
    name, axis, is_gated = CASES[case]
    whole = torch.arange(16 * 24.0).view(16, 24)
    shape = [16, 24]
    if axis is not None:
        shape[axis] //= ranks
    bridge = SimpleNamespace(_get_mcore_config_by_name=lambda name: SimpleNamespace(gated_linear_unit=is_gated))
    shards = Bridge._weight_split_across_tp(bridge, name, whole, torch.empty(shape), ranks)
    assert len(shards) == ranks
    assert merge_shards(name, list(shards), axis, is_gated=is_gated).equal(whole)
