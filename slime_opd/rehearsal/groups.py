"""Process groups of one process: a rank among many that are not there.

torch's own "fake" backend takes every collective and moves nothing, so the rank goes its whole way alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

PRETENDED = (
    "NCCL's and gloo's process groups: torch's fake backend, whose collectives move nothing",
    "all_gather_object: every rank sends what this one sends",
)


@contextmanager
def pretended() -> Iterator[None]:
    """Every process group that is made inside is pretended, whatever backend is named."""
    init_process_group, new_group, all_gather_object = dist.init_process_group, dist.new_group, dist.all_gather_object

    def init(backend: str | None = None, *, rank: int, world_size: int, **options: Any) -> None:
        init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())

    def group(
        ranks: Any = None, timeout: Any = None, backend: Any = None, pg_options: Any = None, **options: Any
    ) -> Any:
        return new_group(ranks, backend="fake", **options)

    def gather(object_list: list, obj: Any, group: Any = None) -> None:
        object_list[:] = [obj] * len(object_list)

    dist.init_process_group, dist.new_group, dist.all_gather_object = init, group, gather
    try:
        yield
    finally:
        dist.init_process_group, dist.new_group = init_process_group, new_group
        dist.all_gather_object = all_gather_object


def is_coalesced(func: Any) -> bool:
    """Whether this is a collective over several tensors at once, which FakeTensorMode does not know."""
    return str(func).startswith("c10d.") and "_coalesced_" in str(func)


def answer(func: Any, args: tuple) -> Any:
    """What such a collective returns: the handle to wait for, of one over empty tensors, whose sizes suit any number of ranks."""
    with _disable_current_modes():
        return func(*tree_map_only(torch.Tensor, lambda tensor: torch.zeros(0), args))
