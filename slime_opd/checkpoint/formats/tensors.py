"""Small helpers for tensors on their way to and from files."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a CPU tensor's bytes."""
    return zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def own_storage(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and in its own storage; a copy if it is a slice of a larger one."""
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
