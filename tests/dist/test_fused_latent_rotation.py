"""Megatron-core's fused rotation of latent attention with yarn, run on a CPU by Triton's interpreter, on packed rows.

Where the layers are Transformer Engine's, `config/kernels.py` chooses it for DeepSeek-V3. In float32 it is the unfused rotation,
values and gradients; the interpreter has no bfloat16. How it is compiled for a GPU is not seen here.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.dist

LENGTHS, HEADS, CONTENT, ROTATED, VALUE, SCALE = [3, 5, 2], 4, 16, 8, 32, 1.3


class Untuned:
    """An autotuned kernel with one setting: tuning needs a GPU's clock."""

    def __init__(self, tuned) -> None:
        self.kernel = tuned.fn

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel[grid({"BLOCK_H": 2})](*arguments, BLOCK_H=2)


def differences() -> dict[str, float]:
    """Fused against unfused: the largest difference of queries, keys, values and gradients."""
    import torch
    from megatron.core.fusions import fused_mla_yarn_rope_apply as fused

    from slime_opd.model import rotary

    for name in ("rotary_fwd_q_kernel", "rotary_bwd_q_kernel", "rotary_fwd_kv_kernel", "rotary_bwd_kv_kernel"):
        setattr(fused, name, Untuned(getattr(fused, name)))
    torch.manual_seed(0)
    total = sum(LENGTHS)
    boundaries = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    freqs = 3 * torch.rand(max(LENGTHS), 1, 1, ROTATED // 2)
    freqs = torch.cat((freqs, freqs), dim=-1)
    cos, sin = (freqs.cos() * SCALE).contiguous(), (freqs.sin() * SCALE).contiguous()
    inputs = [torch.randn(total, HEADS, CONTENT + ROTATED), torch.randn(total, HEADS, CONTENT + VALUE), torch.randn(total, 1, ROTATED)]
    gradients = [torch.randn(total, HEADS, width) for width in (CONTENT + ROTATED, CONTENT + ROTATED, VALUE)]

    def with_fused(query, key_value, key):
        # It rotates queries in place, as the projection's output can be.
        rotated = fused.fused_apply_mla_rope_for_q(query * 1, cos, sin, CONTENT, ROTATED, boundaries)
        return rotated, *fused.fused_apply_mla_rope_for_kv(key_value * 1, key, cos, sin, ROTATED, CONTENT, VALUE, boundaries)

    def without(query, key_value, key):
        def rotate(states):
            return rotary.rotate_packed(states, boundaries, freqs, multi_latent_attention=True, mscale=SCALE)

        content, turned = query.split([CONTENT, ROTATED], dim=-1)
        key_content, value = key_value.split([CONTENT, VALUE], dim=-1)
        rotated_key = torch.cat((key_content, rotate(key).expand(-1, HEADS, -1)), dim=-1)
        return torch.cat((content, rotate(turned)), dim=-1), rotated_key, value

    def results(attend):
        leaves = [x.clone().requires_grad_() for x in inputs]
        outputs = attend(*leaves)
        torch.autograd.backward(outputs, [x.clone() for x in gradients])
        return [x.detach() for x in outputs] + [x.grad for x in leaves]

    names = ("query", "key", "value", "query's gradient", "key and value's gradient", "rotated key's gradient")
    pairs = zip(names, results(with_fused), results(without), strict=True)
    return {name: (found - expected).abs().max().item() for name, found, expected in pairs}


def test_the_fused_rotation_of_latent_attention_is_the_unfused_one():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    found = dict(line.rsplit(": ", 1) for line in run.stdout.splitlines() if ": " in line)
    assert len(found) == 6
    assert all(float(difference) <= 1e-6 for difference in found.values()), found


if __name__ == "__main__":
    for _name, _difference in differences().items():
        print(f"{_name}: {_difference}")
