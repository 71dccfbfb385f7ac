"""Memory that engines on this node can open: shared memory, or CUDA memory through IPC.

The shared memory is an anonymous file of this process, which an engine of the same user opens as /proc/PID/fd/N. There
is no name to unlink: the kernel frees the memory when this process and the engines have closed it, however they end.
torch's own methods either leave files in /dev/shm when a process is killed, or work only between parent and child
processes.
"""

from __future__ import annotations

import base64
import io
import os
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import torch
import torch.multiprocessing
import torch.multiprocessing.reductions  # registers how ForkingPickler pickles tensors
from torch import Tensor

from slime_opd.weights.buckets import NamedTensor

# SGLang's name for a bucket that is one tensor and a description of its parts.
LOAD_FORMAT = "flattened_bucket"
# Alignment of tensors in bytes, enough for every dtype.
_ALIGNMENT = 16


class SharedBucket:
    """A copy of one bucket in its own block of memory, which is never written again.

    A block is not reused, because an engine that has answered may still be copying: SGLang's update ends with a barrier
    of CPU processes, not of GPUs. After `close` the block lives until its readers have closed it: Linux counts the
    mappings of an anonymous file, and torch counts the readers of CUDA memory, which wait for their streams.
    """

    def __init__(self, bucket: list[NamedTensor]) -> None:
        starts, size = [], 0
        for _, tensor in bucket:
            starts.append(size)
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        device = bucket[0][1].device
        self._file = None if device.type == "cuda" else os.memfd_create("slime_opd_weights")
        self._memory = self._allocate(size, device)
        for (_, tensor), start in zip(bucket, starts, strict=True):
            self._memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize()
        # Attributes of SGLang's FlattenedTensorMetadata, without importing SGLang.
        self._parts = [
            SimpleNamespace(
                name=name,
                shape=tensor.shape,
                dtype=tensor.dtype,
                start_idx=start,
                end_idx=start + tensor.nbytes,
                numel=tensor.nbytes,
            )
            for (name, tensor), start in zip(bucket, starts, strict=True)
        ]

    def handle(self) -> str:
        """A handle for one reader, base64 of a pickle in `LOAD_FORMAT`.

        Each reader needs its own, because readers are counted.
        """
        pickled = io.BytesIO()
        pickler = ForkingPickler(pickled)
        if self._file is not None:
            opened = (f"/proc/{os.getpid()}/fd/{self._file}", True, self._memory.numel())
            pickler.dispatch_table[torch.UntypedStorage] = lambda storage: (torch.UntypedStorage.from_file, opened)
        pickler.dump({"flattened_tensor": self._memory, "metadata": self._parts})
        return base64.b64encode(pickled.getvalue()).decode()

    def close(self) -> None:
        """Close the memory. All readers must have opened it; it is freed when the last of them closes it."""
        del self._memory
        if self._file is None:
            # Otherwise memory without readers is kept until an allocation fails.
            torch.cuda.ipc_collect()
        else:
            os.close(self._file)

    def _allocate(self, size: int, device: torch.device) -> Tensor:
        if self._file is None:
            # SGLang names GPUs by their UUID, because two processes may number them differently.
            from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions

            monkey_patch_torch_reductions()
            return torch.empty(size, dtype=torch.uint8, device=device)
        os.ftruncate(self._file, size)
        return torch.from_file(f"/proc/self/fd/{self._file}", shared=True, size=size, dtype=torch.uint8)
