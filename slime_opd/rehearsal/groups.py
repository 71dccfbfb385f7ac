"""Simulated process groups: one process as a rank of many.

torch's "fake" backend accepts every collective and communicates nothing, so the rank needs no others.
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

SIMULATED = (
    "process groups of NCCL and gloo: torch's fake backend, whose collectives communicate nothing",
    "all_gather_object: every rank sends the object of this rank",
)


@contextmanager
def simulated() -> Iterator[None]:
    """Inside, every new process group is simulated, whatever its backend."""
    init_process_group, new_group, all_gather_object = dist.init_process_group, dist.new_group, dist.all_gather_object

    def init(backend: str | None = None, *, rank: int, world_size: int, **options: Any) -> None:
        init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())

    def group(
        ranks: Any = None, timeout: Any = None, backend: Any = None, pg_options: Any = None, **options: Any
    ) -> Any:
        return new_group(ranks, backend="fake", **options)

    def gather(object_list: list, obj: Any, group: Any = None) -> None:
        object_list[:] = [obj] * len(object_list)

    distributed: Any = dist
    distributed.init_process_group, distributed.new_group, distributed.all_gather_object = init, group, gather
    try:
        yield
    finally:
        distributed.init_process_group, distributed.new_group = init_process_group, new_group
        distributed.all_gather_object = all_gather_object


def is_coalesced(func: Any) -> bool:
    """Whether this is a collective over several tensors at once, which FakeTensorMode does not know."""
    return str(func).startswith("c10d.") and "_coalesced_" in str(func)


def answer(func: Any, args: tuple) -> Any:
    """The result of such a collective: the handle of one over empty tensors, whose sizes suit any number of ranks."""
    with _disable_current_modes():
        return func(*tree_map_only(torch.Tensor, lambda tensor: torch.zeros(0), args))
