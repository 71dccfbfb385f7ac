"""Bitwise comparison of two checkpoints: weights and optimizer state."""

from __future__ import annotations

import warnings
from pathlib import Path


def differing_tensors(one: Path, other: Path) -> list[str]:
    """Keys of the tensors that differ between two torch_dist checkpoint directories, or that only one of them has."""
    import torch

    with warnings.catch_warnings():
        # Megatron warns about packages that are not installed.
        warnings.simplefilter("ignore")
        from slime_opd.checkpoint.formats.torch_dist import Reader

    readers = [Reader(directory) for directory in (one, other)]
    described = [reader.tensors() for reader in readers]
    differing = set(described[0].items()) ^ set(described[1].items())
    keys = {key for key, _ in differing}
    for key in described[0].keys() - keys:
        shape, _ = described[0][key]
        values = [reader.read(key, (0,) * len(shape), shape).contiguous().view(torch.uint8) for reader in readers]
        if not torch.equal(*values):
            keys.add(key)
    return sorted(keys)
