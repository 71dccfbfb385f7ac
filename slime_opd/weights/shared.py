"""One buffer that the engines on this machine can open: shared memory, or CUDA memory through IPC.

Shared memory here has no name that somebody would have to unlink. It is an anonymous file of
this process, and an engine opens it as /proc/PID/fd/N, which a process of the same user may.
When this process ends, by whatever means, and the engines have let go of it, it is gone.
torch's own ways either leave files in /dev/shm when a process is killed, or work between relatives only.
"""

from __future__ import annotations

import base64
import io
import os
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
        self._file: int | None = None
        if torch.cuda.is_available():
            # SGLang names GPUs by their UUID, because two processes may number them differently.
            from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions

            monkey_patch_torch_reductions()

    def serialize(self, bucket: list[NamedTensor], readers: int) -> list[str]:
        """Copy the bucket into the buffer; returns it once for each reader, as base64 of a pickled list of (name, handle).

        torch counts the readers of CUDA memory: there a handle is for one reader. The next call overwrites what this one
        laid down.
        """
        starts, end = [], 0
        for _, tensor in bucket:
            starts.append(end)
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        device = bucket[0][1].device
        if self._memory.numel() < end or self._memory.device != device:
            self._memory = self._allocate(end, device)
        views = []
        for (name, tensor), start in zip(bucket, starts, strict=True):
            view = self._memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            view.copy_(tensor)
            views.append((name, view))
        if device.type == "cuda":
            torch.cuda.synchronize()
        return [self._pickle(views) for _ in range(readers)]

    def close(self) -> None:
        """Let go of the memory; it is freed when the engines have let go of it too."""
        self._memory = torch.empty(0, dtype=torch.uint8)
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _allocate(self, size: int, device: torch.device) -> torch.Tensor:
        if device.type == "cuda":
            return torch.empty(size, dtype=torch.uint8, device=device)
        self.close()
        self._file = os.memfd_create("slime_opd_weights")
        os.ftruncate(self._file, size)
        return torch.from_file(f"/proc/self/fd/{self._file}", shared=True, size=size, dtype=torch.uint8)

    def _pickle(self, views: list[NamedTensor]) -> str:
        pickled = io.BytesIO()
        pickler = ForkingPickler(pickled)
        if self._file is not None:
            opened = (f"/proc/{os.getpid()}/fd/{self._file}", True, self._memory.numel())
            pickler.dispatch_table[torch.UntypedStorage] = lambda storage: (torch.UntypedStorage.from_file, opened)
        pickler.dump(views)
        return base64.b64encode(pickled.getvalue()).decode()
