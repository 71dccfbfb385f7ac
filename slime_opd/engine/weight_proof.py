"""The proof that an engine serves given weights; this module runs inside the SGLang server.

An engine fuses, splits and shards what it loads, each model in its own way, so its
parameters cannot be compared with Hugging Face tensors by name. But loading is a function:
if the engine already serves the given tensors, loading them again changes no bit. So SGLang is given
a weight loader (`--custom-weight-loader`) that takes a checksum of every parameter, loads the
tensors the usual way, and notes which checksums changed. SGLang ignores what a loader
returns, and an exception in one ends the server, so the note is fetched with
`/get_weights_by_name`, for which the loader gives the model a method of that name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

LOADER = "slime_opd.engine.weight_proof.note_differing_weights"
REPORT = "slime_opd.differing_weights"

_CHUNK = 1 << 22
_MODULUS = (1 << 31) - 1


def note_differing_weights(model: Any, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Load `named_tensors` and leave the names of the parameters that this changed with the model."""
    before = checksums(model)
    model.load_weights(named_tensors)
    after = checksums(model)
    differing = [name for name, checksum in after.items() if checksum != before[name]]
    model.get_weights_by_name = lambda name, truncate_size=0, tp_size=1: _on_all_ranks(differing)


def checksums(model: torch.nn.Module) -> dict[str, int]:
    """A checksum of the bits of each parameter that depends on their order."""
    return {name: _checksum(parameter.detach()) for name, parameter in model.named_parameters()}


def _checksum(values: torch.Tensor) -> int:
    octets = values.contiguous().view(-1).view(torch.uint8)
    # Two sums, plain and weighted by place, in chunks that keep both exact in int64.
    total = 0
    for start in range(0, octets.numel(), _CHUNK):
        chunk = octets[start : start + _CHUNK].to(torch.int64)
        places = torch.arange(1, chunk.numel() + 1, device=chunk.device)
        total = (total * 1_000_003 + int((chunk * places).sum()) * 31 + int(chunk.sum())) % (_MODULUS * _MODULUS)
    return total


def _on_all_ranks(names: list[str]) -> list[str]:
    """The names of all tensor-parallel ranks of the engine; rank 0 alone answers a request."""
    if not torch.distributed.is_initialized():
        return sorted(names)
    from sglang.srt.distributed import get_tp_group

    group = get_tp_group().cpu_group
    gathered: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather_object(gathered, names, group=group)
    return sorted({name for part in gathered for name in part})
