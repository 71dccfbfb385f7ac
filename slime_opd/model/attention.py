"""Core attention over packed sequences, used instead of Transformer Engine's.

Megatron's local DotProductAttention takes no packed sequences, and Transformer Engine's kernels do not support every
head size on every GPU. This attention works within each segment of a packed row, so no padding token is ever computed.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from slime_opd.config.kernels import AttentionKernel
from slime_opd.errors import SlimeOPDError


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's packed-sequence parameters, and the segment lengths as Python integers.

    `runs` lists (number of segments, length) of consecutive segments of equal length. A packed row sorted by length has
    few runs, and each run is one batched attention call on a CPU.
    """

    runs: tuple[tuple[int, int], ...] = ()


def packed_sequences(lengths: list[int], device: torch.device) -> PackedSequences:
    """Parameters of a packed row of segments of these `lengths`, in order."""
    cumulative = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    cumulative[1:] = torch.cumsum(torch.tensor(lengths, dtype=torch.int32), dim=0)
    cumulative = cumulative.to(device, non_blocking=True)
    longest = max(lengths)
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cumulative,
        cu_seqlens_kv=cumulative,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        runs=tuple((len(list(group)), length) for length, group in groupby(lengths)),
    )


class PackedCoreAttention(torch.nn.Module):
    """Causal self-attention within each segment of a packed row.

    Megatron's attention builds it from a layer spec, with the arguments of any core attention. `kernel` and
    `repeats_groups` (whether keys and values are repeated for each query head) come from the layer spec;
    `config/kernels.py` chooses them for the machine.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        *,
        kernel: AttentionKernel = "segments",
        repeats_groups: bool = False,
        **unused: Any,
    ) -> None:
        super().__init__()
        if config.context_parallel_size > 1:
            raise SlimeOPDError("--context-parallel-size: packed rows are not split over ranks; set it to 1")
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout
        # Tensor-parallel ranks have different heads, so they need different random numbers, from Megatron's tracker.
        # With sequence parallelism Megatron forks the tracker around the whole block already.
        self.forks_generator = not config.sequence_parallel
        self.attend = _KERNELS[kernel]
        self.repeats_groups = repeats_groups

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: PackedSequences,
        **unused: Any,
    ) -> Tensor:
        """Query [T, heads, width], key [T, groups, width], value [T, groups, v width] to [T, heads * v width]."""
        if self.repeats_groups:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        dropout = self.dropout if self.training else 0.0
        forks = dropout and self.forks_generator and query.is_cuda
        with get_cuda_rng_tracker().fork() if forks else nullcontext():
            output = self.attend(query, key, value, packed_seq_params, self.softmax_scale, dropout)
        return output.flatten(start_dim=1)


def _segment_attention(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, scale: float | None, dropout: float
) -> Tensor:
    """One scaled-dot-product call for each run of segments of equal length."""
    outputs = []
    start = 0
    for count, length in packed.runs:
        rows = slice(start, start + count * length)
        start = rows.stop
        q, k, v = (x[rows].unflatten(0, (count, length)).transpose(1, 2) for x in (query, key, value))
        attended = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, dropout_p=dropout, enable_gqa=query.shape[1] != key.shape[1]
        )
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def _varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, scale: float | None, dropout: float
) -> Tensor:
    """torch's variable-length flash kernel, which has no dropout."""
    from torch.nn.attention.varlen import varlen_attn

    groups: dict[str, Any] = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    # A window of (-1, 0) is causal attention.
    output = varlen_attn(query, key, value, *_bounds(packed), scale=scale, window_size=(-1, 0), **groups)
    return cast("Tensor", output)  # a tuple only with the log-sum-exp, which is not requested


def _flash_attention(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, scale: float | None, dropout: float
) -> Tensor:
    """flash-attn 2."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query,
        key,
        value,
        *_bounds(packed),
        dropout_p=dropout,
        softmax_scale=scale,
        causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def _bounds(packed: PackedSequences) -> tuple[Tensor, Tensor, int, int]:
    return packed.cu_seqlens_q, packed.cu_seqlens_kv, packed.max_seqlen_q, packed.max_seqlen_kv


_KERNELS = {"segments": _segment_attention, "varlen": _varlen_attention, "flash_attn": _flash_attention}
