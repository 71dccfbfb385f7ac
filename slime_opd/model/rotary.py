"""Rotary embedding of packed rows without waiting for the device.

Without Transformer Engine's fused kernel, Megatron-core rotates a packed row by reading the segment boundaries back
from the device (`.tolist()`, a comparison, `.item()`) and slicing the frequencies for each segment: for the queries and
the keys of every layer, and again when activations are recomputed. On CUDA each of these reads waits for all queued
kernels. Here the tokens' positions are computed from the boundaries on the device, once per row.
"""

from __future__ import annotations

import torch
from megatron.core.models.common.embeddings import rope_utils
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.weak import WeakTensorKeyDictionary

_with_context_parallel = rope_utils._apply_rotary_pos_emb_thd

# Positions of the rows in use, by their boundaries: an entry lives as long as the row's micro-batch.
_positions_of_rows = WeakTensorKeyDictionary()


def install() -> None:
    """Replace Megatron-core's function by `rotate_packed`; a second call changes nothing.

    This is safe: its only caller, `rope_utils.apply_rotary_pos_emb`, looks it up by this name at each call, and both
    give the same bits (a test compares them for every kind of rotation).
    """
    rope_utils._apply_rotary_pos_emb_thd = rotate_packed


def rotate_packed(
    states: Tensor,
    cu_seqlens: Tensor,
    freqs: Tensor,
    rotary_interleaved: bool = False,
    multi_latent_attention: bool = False,
    mscale: float = 1.0,
    cp_group: ProcessGroup | None = None,
) -> Tensor:
    """Rotate `states` [T, heads, head_dim] by each token's position in its segment, as Megatron's function does.

    `cu_seqlens`: int32 [segments + 1], from 0 to T. `freqs`: float32 [longest segment or more, 1, 1, rotated width];
    dimensions past the rotated width are not changed.
    """
    if cp_group is not None and cp_group.size() > 1:
        return _with_context_parallel(
            states, cu_seqlens, freqs, rotary_interleaved, multi_latent_attention, mscale, cp_group
        )
    return rope_utils._apply_rotary_pos_emb_bshd(
        states.unsqueeze(1),
        freqs.index_select(0, _positions(cu_seqlens, len(states))),
        rotary_interleaved=rotary_interleaved,
        multi_latent_attention=multi_latent_attention,
        mscale=mscale,
    ).squeeze(1)


def _positions(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Each token's position in its segment, int32 [T]."""
    positions = _positions_of_rows.get(cu_seqlens)
    if positions is None:
        indices = torch.arange(tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
        segments = torch.searchsorted(cu_seqlens, indices, right=True) - 1
        positions = _positions_of_rows[cu_seqlens] = indices - cu_seqlens[segments]
    return positions
