"""Core attention of packed rows: each kernel gets all arguments that the model needs, and layers use the chosen one."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.spec_utils import build_module

from slime_opd.config.kernels import Kernels
from slime_opd.model import layers
from slime_opd.model.attention import PackedCoreAttention, packed_sequences

LENGTHS = [3, 5, 5]
HEADS, GROUPS, WIDTH = 4, 2, 8


def attention(dropout: float = 0.0, **choice) -> PackedCoreAttention:
    config = SimpleNamespace(context_parallel_size=1, attention_dropout=dropout, sequence_parallel=True)
    return PackedCoreAttention(config, 1, None, "self", softmax_scale=0.3, **choice)


def heads(value_width: int = WIDTH, groups: int = GROUPS):
    draw = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    return tuple(
        torch.randn(total, count, width, generator=draw)
        for count, width in ((HEADS, WIDTH), (groups, WIDTH), (groups, value_width))
    )


def attend(module, query, key, value):
    return module(query, key, value, None, packed_seq_params=packed_sequences(LENGTHS, torch.device("cpu")))


def brute_force(query, key, value):
    """Softmax over the tokens of the same segment that are not later, in float64."""
    segment = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    order = torch.arange(len(query))
    allowed = (segment[:, None] == segment) & (order[:, None] >= order)
    key, value = (x.repeat_interleave(HEADS // x.shape[1], dim=1) for x in (key, value))
    scores = 0.3 * torch.einsum("qhd,khd->hqk", query.double(), key.double()).masked_fill(~allowed, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value.double()).flatten(1)


@pytest.mark.parametrize("repeats_groups", [False, True])
@pytest.mark.parametrize(("value_width", "groups"), [(WIDTH, GROUPS), (WIDTH, HEADS), (WIDTH - 2, HEADS)])
def test_segments_equal_brute_force(value_width, groups, repeats_groups):
    inputs = heads(value_width, groups)
    found = attend(attention(repeats_groups=repeats_groups), *inputs)
    assert found.shape == (sum(LENGTHS), HEADS * value_width)
    torch.testing.assert_close(found.double(), brute_force(*inputs), rtol=0, atol=1e-6)


def test_dropout_is_applied_in_training_only():
    inputs = heads()
    module = attention(dropout=0.5)
    exact = attend(attention(), *inputs)
    assert not torch.equal(attend(module.train(), *inputs), exact)
    assert torch.equal(attend(module.eval(), *inputs), exact)


def recorded(calls: list):
    def kernel(query, *arguments, **options):
        calls.append(((query, *arguments), options))
        return torch.zeros_like(query)

    return kernel


@pytest.mark.parametrize(("repeats_groups", "groups_seen"), [(False, GROUPS), (True, HEADS)])
def test_torchs_variable_length_kernel_is_given_boundaries_scale_and_groups(monkeypatch, repeats_groups, groups_seen):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    calls = []
    monkeypatch.setattr(varlen, "varlen_attn", recorded(calls))
    attend(attention(kernel="varlen", repeats_groups=repeats_groups), *heads())
    ((arguments, options),) = calls
    assert [x.shape[1] for x in arguments[1:3]] == [groups_seen] * 2
    assert [x.tolist() for x in arguments[3:5]] == [[0, 3, 8, 13]] * 2
    assert arguments[5:] == (5, 5)
    assert options == {"scale": 0.3, "window_size": (-1, 0)} | ({} if repeats_groups else {"enable_gqa": True})


def test_flash_attn_is_given_boundaries_scale_and_dropout(monkeypatch):
    calls, module = [], ModuleType("flash_attn")
    module.flash_attn_varlen_func = recorded(calls)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    core = attention(dropout=0.25, kernel="flash_attn")
    attend(core.train(), *heads())
    attend(core.eval(), *heads())
    (arguments, training), (_, scoring) = calls
    assert [x.tolist() for x in arguments[3:5]] == [[0, 3, 8, 13]] * 2
    assert training == {"dropout_p": 0.25, "softmax_scale": 0.3, "causal": True, "deterministic": False}
    assert scoring["dropout_p"] == 0.0


def test_grouped_heads_of_the_installed_variable_length_kernel_keep_their_shape():
    # On meta tensors torch's kernel runs as a description of its shapes, gradients included.
    pytest.importorskip("torch.nn.attention.varlen")
    query, key, value = (x.to("meta", torch.bfloat16).requires_grad_() for x in heads())
    packed = packed_sequences(LENGTHS, torch.device("meta"))
    core = attention(kernel="varlen")
    output = core(query, key, value, None, packed_seq_params=packed)
    output.sum().backward()
    assert output.shape == (sum(LENGTHS), HEADS * WIDTH)
    assert key.grad.shape == key.shape


class Config(SimpleNamespace):
    """The fields of a plain TransformerConfig that Megatron's layer specs read."""

    def __getattr__(self, name):
        return None


@pytest.mark.parametrize("kernel", ["segments", "varlen", "flash_attn"])
def test_layers_use_the_chosen_kernel(monkeypatch, kernel):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    block = TransformerBlockSubmodules(layer_specs=[get_gpt_layer_local_spec()], layer_norm=None)
    monkeypatch.setattr(layers, "get_gpt_decoder_block_spec", lambda *arguments, **options: block)
    config = Config(multi_latent_attention=False, context_parallel_size=1, attention_dropout=0.0)
    made = layers.decoder_block(config, Kernels(uses_engine=False, attention=kernel, repeats_groups=True))
    core = made.layer_specs[0].submodules.self_attention.submodules.core_attention
    arguments = {"config": config, "layer_number": 1, "attn_mask_type": None, "attention_type": "self"}
    # Attention calls the spec; latent attention has Megatron build it.
    for module in (core(**arguments), build_module(core, **arguments)):
        assert isinstance(module, PackedCoreAttention)
        assert module.attend is attention(kernel=kernel).attend
        assert module.repeats_groups


def test_transformer_engines_layers_keep_their_own_attention_unless_another_is_chosen(monkeypatch):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    spec = get_gpt_layer_local_spec()
    own = spec.submodules.self_attention.submodules.core_attention
    block = TransformerBlockSubmodules(layer_specs=[spec], layer_norm=None)
    monkeypatch.setattr(layers, "get_gpt_decoder_block_spec", lambda *arguments, **options: block)
    found = layers.decoder_block(Config(), Kernels(uses_engine=True, attention="engine"))
    assert found.layer_specs[0].submodules.self_attention.submodules.core_attention is own
    found = layers.decoder_block(Config(), Kernels(uses_engine=True, attention="varlen"))
    core = found.layer_specs[0].submodules.self_attention.submodules.core_attention
    assert (core.module, core.params["kernel"]) == (PackedCoreAttention, "varlen")


def test_consecutive_segments_of_equal_length_are_one_kernel_call(monkeypatch):
    shapes, real = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, *a, **o: shapes.append(tuple(q.shape)) or real(q, *a, **o)
    )
    attend(attention(), *heads())
    assert shapes == [(1, HEADS, 3, WIDTH), (2, HEADS, 5, WIDTH)]
