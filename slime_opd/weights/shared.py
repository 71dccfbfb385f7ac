"""One buffer that the engines on this machine can open: shared memory, or CUDA memory through IPC."""

from __future__ import annotations

import base64
import io
from multiprocessing.reduction import ForkingPickler

import torch
import torch.multiprocessing
import torch.multiprocessing.reductions  # registers how ForkingPickler pickles tensors

from slime_opd.weights.buckets import NamedTensor

# Offsets of this many bytes suit every dtype.
_ALIGNMENT = 16


class SharedBuffer:
    """Buckets laid in one block of memory, so that an engine opens one handle and not one per tensor."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        if torch.cuda.is_available():
            # SGLang names GPUs by their UUID, because two processes may number them differently.
            from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions

            monkey_patch_torch_reductions()
        else:
            # With torch's default strategy only descendants of this process could open the memory.
            torch.multiprocessing.set_sharing_strategy("file_system")

    def serialize(self, bucket: list[NamedTensor], readers: int) -> list[str]:
        """Copy the bucket into the buffer; returns it once for each reader, as base64 of a pickled list of (name, handle).

        torch counts references: a handle is for one reader, and the memory is unlinked when a second one has opened it too.
        The next call overwrites what this one laid down.
        """
        starts, end = [], 0
        for _, tensor in bucket:
            starts.append(end)
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        device = bucket[0][1].device
        if self._memory.numel() < end or self._memory.device != device:
            self._memory = torch.empty(end, dtype=torch.uint8, device=device).share_memory_()
        views = []
        for (name, tensor), start in zip(bucket, starts, strict=True):
            view = self._memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            view.copy_(tensor)
            views.append((name, view))
        if device.type == "cuda":
            torch.cuda.synchronize()
        return [_pickled(views) for _ in range(readers)]


def _pickled(views: list[NamedTensor]) -> str:
    pickled = io.BytesIO()
    ForkingPickler(pickled).dump(views)
    return base64.b64encode(pickled.getvalue()).decode()
