"""Finds the lines of code where the host waits for the device.

A fake tensor has no values, so every read of one by the host ends up here: the line is recorded, and a made-up value
returned. Blocking copies to the device and `torch.cuda.synchronize` are recorded as well. A non-blocking copy of
pageable memory is not: the host only waits for its staging.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, Self

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from slime_opd.rehearsal import groups, where

READ, BLOCKING_COPY, SYNCHRONIZE = (
    "the host reads a tensor",
    "a copy to the device blocks",
    "the host waits for all work",
)

# Made-up values of tensors that the host reads, by the reading function; 1 in any other.
_ANSWERS: dict[str, list[float]] = {
    # The number of infinite losses, and the squared norm of the gradients.
    "non_finite": [0.0, 1.0],
}

# Host tensors of up to this many elements are computed.
_SMALL = 2**20

_NATIVE = torch.device("cuda", 0)


class FakeTensors(FakeTensorMode):
    """FakeTensorMode that copies no values from the host to the device, which does not exist."""

    avoid_device_init = True


class HostSyncs(TorchDispatchMode):
    """Counts, by kind and line, the operations at which the host waits for the device.

    Enter it inside FakeTensorMode.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, where.Line]] = Counter()

    def note(self, kind: str) -> None:
        """Record a wait at the running line of the program."""
        self.counts[kind, where.caller()] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if _is_of_host(args, kwargs):
            with _disable_current_modes():
                return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return self.number(args[0])
        if groups.is_coalesced(func):
            return groups.answer(func, args)
        if func is torch.ops.aten._to_copy.default:
            self._note_copy(args[0].device.type, torch.device(kwargs.get("device") or args[0].device).type, kwargs)
        elif func is torch.ops.aten.copy_.default:
            self._note_copy(args[1].device.type, args[0].device.type, {"non_blocking": any(args[2:])} | kwargs)
        return func(*args, **kwargs)

    def _note_copy(self, source: str, target: str, options: dict) -> None:
        if options.get("non_blocking") or source == target:
            return
        self.note(READ if source == "cuda" else BLOCKING_COPY)

    def number(self, tensor: torch.Tensor) -> bool | int | float:
        """A made-up value for `tensor.item()`."""
        if tensor.device.type == "cuda":
            self.note(READ)
        return 1.0 if tensor.is_floating_point() else _numpy_dtype(tensor)(1).item()

    def read(self, tensor: torch.Tensor) -> Any:
        """Made-up values for `tensor.tolist()`."""
        if tensor.device.type == "cuda":
            self.note(READ)
        answer = _ANSWERS.get(where.caller().function)
        if answer is not None:
            return list(answer)
        return np.ones(tuple(tensor.shape), dtype=_numpy_dtype(tensor)).tolist()


class FakeDevice(TorchFunctionMode):
    """Calls that FakeTensorMode does not handle: device indices, pinned memory, tensors read as lists and arrays."""

    def __init__(self, syncs: HostSyncs) -> None:
        super().__init__()
        self._syncs = syncs
        self._replaced = (torch.cuda.synchronize, FakeTensor.tolist)

    def __enter__(self) -> Self:
        torch.cuda.synchronize = lambda device=None: self._syncs.note(SYNCHRONIZE)
        # The original method reads one element after the other.
        fake_tensor: Any = FakeTensor
        fake_tensor.tolist = lambda tensor: self._syncs.read(tensor)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        fake_tensor: Any = FakeTensor
        torch.cuda.synchronize, fake_tensor.tolist = self._replaced

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.numpy and isinstance(args[0], FakeTensor):
            return np.ones(tuple(args[0].shape), dtype=_numpy_dtype(args[0]))
        if func is torch.Tensor.pin_memory:
            return args[0]
        kwargs.pop("pin_memory", None)
        if func is torch.Tensor.cuda:
            return args[0].to(_NATIVE, non_blocking=kwargs.get("non_blocking", False))
        if type(kwargs.get("device")) is int:
            kwargs["device"] = _NATIVE
        if func is torch.Tensor.to and len(args) > 1 and type(args[1]) is int:
            args = (args[0], _NATIVE, *args[2:])
        if func is torch.tensor:
            # Values that are on the device already are read first.
            args = (tree_map_only(FakeTensor, self._syncs.number, args[0]), *args[1:])
            if torch.device(kwargs.get("device") or "cpu").type == "cuda":
                # Created on the host and copied with a wait; FakeTensorMode would try to copy the values.
                self._syncs.note(BLOCKING_COPY)
                on_host = func(*args, **kwargs | {"device": "cpu"})
                return torch.empty(on_host.shape, dtype=on_host.dtype, device=_NATIVE)
        return func(*args, **kwargs)


def _is_of_host(args: tuple, kwargs: dict) -> bool:
    """Whether an operation makes small host tensors from host tensors only: those have values, and are computed."""
    if torch.device(kwargs.get("device") or "cpu").type != "cpu":
        return False
    leaves = tree_leaves(args)
    if any(isinstance(value, FakeTensor) for value in leaves):
        return False
    if any(isinstance(value, torch.Tensor) for value in leaves):
        return True
    return math.prod(value for value in leaves if type(value) is int) <= _SMALL


def _numpy_dtype(tensor: torch.Tensor) -> type:
    return getattr(np, str(tensor.dtype).removeprefix("torch."))
