"""Memory that the engines of this machine can open: shared memory, or CUDA memory through IPC.

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
from types import SimpleNamespace

import torch
import torch.multiprocessing
import torch.multiprocessing.reductions  # registers how ForkingPickler pickles tensors
from torch import Tensor

from slime_opd.weights.buckets import NamedTensor

# SGLang's name for a bucket that is one tensor and a description of its parts.
LOAD_FORMAT = "flattened_bucket"
# Offsets of this many bytes suit every dtype.
_ALIGNMENT = 16


class SharedBucket:
    """A copy of one bucket in a block of memory of its own, which is never written again.

    An engine that answers may still be copying: SGLang's update ends with a barrier of CPU processes, not of GPUs. So a block is not
    used twice. After `close` it lives on until its readers have let go of it: Linux counts the mappings of an anonymous file, and
    torch counts the readers of CUDA memory, each of which waits for its stream before it counts itself out.
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
        """What one reader opens the bucket with, for `LOAD_FORMAT`: base64 of a pickle. Each reader needs its own, as they are counted."""
        pickled = io.BytesIO()
        pickler = ForkingPickler(pickled)
        if self._file is not None:
            opened = (f"/proc/{os.getpid()}/fd/{self._file}", True, self._memory.numel())
            pickler.dispatch_table[torch.UntypedStorage] = lambda storage: (torch.UntypedStorage.from_file, opened)
        pickler.dump({"flattened_tensor": self._memory, "metadata": self._parts})
        return base64.b64encode(pickled.getvalue()).decode()

    def close(self) -> None:
        """Let go of the memory. Readers must have opened it by now; it is freed when the last of them has let go too."""
        is_cuda = self._file is None
        del self._memory
        if is_cuda:
            # Without it, memory that its readers have left is kept until an allocation fails.
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
