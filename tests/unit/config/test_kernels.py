"""Described machines get the kernels that they can run, or one sentence about what they cannot."""

from dataclasses import replace

import pytest

from slime_opd.config.kernels import Attention, Kernels, Machine, choose_kernels
from slime_opd.errors import ConfigError

# torch 2.9 has no variable-length attention; 2.10's has neither scale nor window; later ones have both, then groups
# too.
TORCH_2_10 = frozenset({"query", "is_causal"})
TORCH_2_11 = frozenset({"query", "scale", "window_size"})
TORCH_2_13 = TORCH_2_11 | {"enable_gqa"}

CPU = Machine()
H100 = Machine(has_cuda=True, compute_capability=(9, 0))
H100_TE = replace(H100, engine="2.11.0")
H100_TE_FLASH = replace(H100_TE, engine_flash=frozenset({2}), flash_attn="2.8.3")
H100_TE_FLASH_3 = replace(H100_TE, engine_flash=frozenset({3}))
H100_FLASH = replace(H100, flash_attn="2.8.3")
H100_2_13 = replace(H100, varlen_options=TORCH_2_13)
H100_BROKEN = replace(H100, engine="2.11.0", engine_error="OSError: libcudnn.so.9: cannot open shared object file")
A100 = Machine(has_cuda=True, compute_capability=(8, 0))
A100_TE = replace(A100, engine="2.11.0")
A100_TE_FLASH = replace(A100_TE, engine_flash=frozenset({2}), flash_attn="2.8.3")
B200_TE = replace(H100_TE, compute_capability=(10, 0))
RTX_5090_TE = replace(H100_TE, compute_capability=(12, 0))
V100_FLASH = replace(H100_FLASH, compute_capability=(7, 0))

QWEN = Attention()
DROPOUT = Attention(dropout=0.1)
FP32 = Attention(dtype="fp32")
GLM4 = Attention(is_interleaved=True)
MOONLIGHT = Attention(is_latent=True, query_width=192)
DEEPSEEK = replace(MOONLIGHT, has_yarn=True)

ENGINE = Kernels(uses_engine=True, attention="engine", rope_fusion=True)


@pytest.mark.parametrize(
    ("machine", "attention", "expected"),
    [
        # machine, attention -> layers of Transformer Engine, kernel of a packed row, fused rotation, repeated groups
        (CPU, QWEN, (False, "segments", False, False)),
        (CPU, FP32, (False, "segments", False, False)),
        (CPU, Attention(backend="flash"), (False, "segments", False, False)),
        (H100_TE, QWEN, (True, "engine", True, False)),
        (H100_TE, Attention(dtype="fp16"), (True, "engine", True, False)),
        (H100_TE, Attention(backend="fused"), (True, "engine", True, False)),
        (H100_TE, Attention(backend="unfused", dtype="fp32"), (True, "engine", True, False)),
        (H100_TE, Attention(backend="local"), (False, "segments", False, False)),
        (H100_TE, GLM4, (True, "engine", False, False)),
        (H100_TE, MOONLIGHT, (True, "engine", False, False)),
        (H100_TE, DEEPSEEK, (True, "engine", True, False)),
        (H100_TE, replace(DEEPSEEK, latent_widths=(96, 64), query_width=160), (True, "segments", False, False)),
        (H100_TE, Attention(rope_fusion=False), (True, "engine", False, False)),
        (H100_TE, DROPOUT, (True, "engine", True, False)),
        (H100_TE, FP32, (True, "segments", True, True)),
        (H100_TE, Attention(query_width=256, value_width=256), (True, "engine", True, False)),
        (B200_TE, Attention(query_width=256, value_width=256), (True, "segments", True, False)),
        (B200_TE, DEEPSEEK, (True, "engine", True, False)),
        (RTX_5090_TE, QWEN, (True, "segments", True, False)),
        (H100_TE_FLASH, QWEN, (True, "engine", True, False)),
        (H100_TE_FLASH, Attention(backend="flash"), (True, "engine", True, False)),
        (H100_TE_FLASH, replace(DROPOUT, backend="flash"), (True, "engine", True, False)),
        (H100_TE_FLASH_3, replace(DEEPSEEK, backend="flash"), (True, "engine", True, False)),
        (A100_TE, QWEN, (True, "segments", True, False)),
        (replace(A100_TE, varlen_options=TORCH_2_13), QWEN, (True, "varlen", True, False)),
        (A100_TE_FLASH, QWEN, (True, "engine", True, False)),
        (A100_TE_FLASH, MOONLIGHT, (True, "segments", False, False)),
        (H100, QWEN, (False, "segments", False, False)),
        (H100, FP32, (False, "segments", False, True)),
        (replace(H100, varlen_options=TORCH_2_10), QWEN, (False, "segments", False, False)),
        (replace(H100, varlen_options=TORCH_2_11), QWEN, (False, "varlen", False, True)),
        (H100_2_13, QWEN, (False, "varlen", False, False)),
        (H100_2_13, DROPOUT, (False, "segments", False, False)),
        (H100_2_13, FP32, (False, "segments", False, True)),
        (H100_2_13, MOONLIGHT, (False, "segments", False, False)),
        (replace(H100_2_13, flash_attn="2.8.3"), QWEN, (False, "flash_attn", False, False)),
        (H100_FLASH, DROPOUT, (False, "flash_attn", False, False)),
        (H100_FLASH, Attention(backend="flash"), (False, "flash_attn", False, False)),
        (H100_FLASH, FP32, (False, "segments", False, True)),
        (H100_FLASH, MOONLIGHT, (False, "segments", False, False)),
        (V100_FLASH, Attention(dtype="fp16"), (False, "segments", False, True)),
        (H100_BROKEN, Attention(backend="local"), (False, "segments", False, False)),
    ],
)  # fmt: skip
def test_a_machine_gets_kernels_that_it_can_run(machine, attention, expected):
    found = choose_kernels(machine, attention)
    assert (found.uses_engine, found.attention, found.rope_fusion, found.repeats_groups) == expected


@pytest.mark.parametrize(
    ("machine", "attention", "sentence"),
    [
        (H100_TE, Attention(backend="flash"), "--attention-backend flash: flash-attn is not installed here in a version"),
        (H100, Attention(backend="flash"), "--attention-backend flash: flash-attn is not installed here, or cannot"),
        (H100_TE_FLASH, replace(FP32, backend="flash"), "takes --bf16 and --fp16 only"),
        (H100_TE_FLASH, replace(MOONLIGHT, backend="flash"), "heads of one width, found 192 for queries and 128 for values"),
        (H100_TE_FLASH_3, replace(DROPOUT, backend="flash"), "flash-attn 3 needs a GPU of compute capability 9.0, no dropout"),
        (V100_FLASH, Attention(backend="flash"), "compute capability 8.0 or more, found 7.0"),
        (A100_TE, Attention(backend="fused"), "takes packed rows on Hopper and data-center Blackwell GPUs only, found compute capability 8.0"),
        (H100_TE, replace(FP32, backend="fused"), "takes --bf16 and --fp16 only"),
        (B200_TE, Attention(backend="fused", query_width=256, value_width=256), "cannot train head widths of 256"),
        (H100, Attention(backend="fused"), "the kernel is Transformer Engine's, which is not installed here"),
        (H100, Attention(backend="unfused"), "the kernel is Transformer Engine's, which is not installed here"),
        (H100_BROKEN, QWEN, "Transformer Engine 2.11.0 is installed here but cannot be imported (OSError: libcudnn.so.9"),
        (H100_BROKEN, Attention(backend="fused"), "--attention-backend local"),
        (H100_TE, replace(GLM4, rope_fusion=True), "--apply-rope-fusion: Megatron-core does not tell the fused kernel"),
        (H100_TE, replace(MOONLIGHT, rope_fusion=True), "--apply-rope-fusion: the fused kernel of latent attention is for yarn"),
        (H100_TE, replace(DEEPSEEK, latent_widths=(96, 64), rope_fusion=True), "powers of two only; drop the flag"),
        (H100, Attention(rope_fusion=True), "--apply-rope-fusion: the kernel is Transformer Engine's"),
        (CPU, Attention(rope_fusion=True), "--apply-rope-fusion: the kernel is Transformer Engine's"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_in_one_sentence(machine, attention, sentence):
    with pytest.raises(ConfigError) as refused:
        choose_kernels(machine, attention)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("machine", "attention", "sentence"),
    [
        (H100, QWEN, "Transformer Engine is not installed here: layers are Megatron-core's own"),
        (H100, QWEN, "attention is torch's scaled_dot_product_attention, segment by segment; install it"),
        (H100_2_13, QWEN, "attention is torch's variable-length attention"),
        (H100_FLASH, QWEN, "attention is flash-attn 2.8.3"),
        (A100_TE, QWEN, "because no fused kernel of Transformer Engine can run it here (fused: it takes packed rows on Hopper"),
        (H100_TE, FP32, "attention is torch's scaled_dot_product_attention, segment by segment, because"),
    ],
)  # fmt: skip
def test_a_slower_path_is_noted_with_its_reason(machine, attention, sentence):
    assert sentence in choose_kernels(machine, attention).note


@pytest.mark.parametrize("machine", [CPU, H100_TE, H100_TE_FLASH, replace(H100, engine=None)])
def test_a_requested_kernel_needs_no_note(machine):
    backend = "local" if machine.has_cuda and machine.engine is None else "auto"
    assert choose_kernels(machine, Attention(backend=backend)).note is None


def test_the_whole_choice_of_a_usual_machine():
    assert choose_kernels(H100_TE, QWEN) == ENGINE
