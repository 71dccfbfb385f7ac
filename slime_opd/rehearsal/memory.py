"""Live memory of the simulated device: its size over time, its peak, and the lines of code that hold it at the peak.

Storages are followed from the operation that creates them until Python frees them, so views, aliases and reused buffers
are counted once. Sizes are rounded up to 512 bytes, as in CUDA's caching allocator; memory that the allocator reserves
beyond them or loses to fragmentation is not counted.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slime_opd.rehearsal import where

_GRANULE = 512


@dataclass
class Phase:
    """Measurements of one phase of a step; several entries of one phase add up. Bytes are on the device.

    start, peak, end: live bytes. kernels: operations that would be sent to the device. holders: live bytes by line of
    code, at the peak.
    """

    name: str
    start: int = 0
    peak: int = 0
    end: int = 0
    kernels: int = 0
    collectives: int = 0
    holders: Counter[str] = field(default_factory=Counter)


class LiveMemory(TorchDispatchMode):
    """Follows every storage that operations inside create, by phase. Enter it inside FakeTensorMode.

    bytes, peak_bytes: live now and at the peak, by device type. kernels: number of launches, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phases: dict[str, Phase] = {}
        self.bytes = {"cuda": 0, "cpu": 0}
        self.peak_bytes = {"cuda": 0, "cpu": 0}
        self.kernels: Counter[str] = Counter()
        self._phase = self._enter("other")
        self._stack: list[Phase] = []
        self._sizes: dict[int, tuple[str, int, str]] = {}
        self._holders: Counter[str] = Counter()
        self._is_at_peak = False

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """Count what happens inside under `name`."""
        self._note_peak()
        self._stack.append(self._phase)
        self._phase = self._enter(name)
        try:
            yield self._phase
        finally:
            self._leave(self._stack.pop())

    def switch(self, name: str) -> None:
        """Count what comes next under `name`, until this phase's block ends."""
        self._leave(self._enter(name))

    def _enter(self, name: str) -> Phase:
        phase = self.phases.get(name)
        if phase is None:
            live = getattr(self, "bytes", {"cuda": 0})["cuda"]
            phase = self.phases[name] = Phase(name, live, live, live)
        return phase

    def _leave(self, to: Phase) -> None:
        self._note_peak()
        self._phase.end = self.bytes["cuda"]
        self._phase = to
        self._rise()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        kind = _kind(func)
        on_device = False
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                on_device |= tensor.device.type == "cuda"
                self._follow(tensor)
        if kind == "collective":
            self._phase.collectives += 1
        elif kind == "kernel" and (on_device or _has_device_argument(args)):
            self._phase.kernels += 1
            self.kernels[str(func)] += 1
        return out

    def _follow(self, tensor: torch.Tensor) -> None:
        device = tensor.device.type
        if device not in self.bytes:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = -(-storage.nbytes() // _GRANULE) * _GRANULE
        line = str(where.caller()) if device == "cuda" and size >= 2**20 else "small tensors"
        self._sizes[key] = (device, size, line)
        self.bytes[device] += size
        self.peak_bytes[device] = max(self.peak_bytes[device], self.bytes[device])
        if device == "cuda":
            self._holders[line] += size
            self._rise()
        weakref.finalize(storage, self._forget, key)

    def _rise(self) -> None:
        if self.bytes["cuda"] > self._phase.peak:
            self._phase.peak = self.bytes["cuda"]
            self._is_at_peak = True

    def _forget(self, key: int) -> None:
        device, size, line = self._sizes.pop(key)
        if device == "cuda":
            self._note_peak()
            self._holders[line] -= size
        self.bytes[device] -= size

    def _note_peak(self) -> None:
        """Record the holders of the memory, which is about to fall from a peak."""
        if self._is_at_peak:
            self._phase.holders = +self._holders
            self._is_at_peak = False


_KINDS: dict[Any, str] = {}


def _kind(func: Any) -> str:
    """The kind of an operation for the device: "kernel", "collective" or "view" (no work)."""
    kind = _KINDS.get(func)
    if kind is None:
        name, schema = str(func), getattr(func, "_schema", None)
        aliases = schema is not None and any(
            value.alias_info is not None and not value.alias_info.is_write for value in schema.returns
        )
        launches_none = name.split(".")[1] in _NO_KERNEL if name.count(".") else False
        if name.startswith(("c10d.", "_c10d_functional.")):
            kind = "collective"
        else:
            kind = "view" if aliases or launches_none else "kernel"
        _KINDS[func] = kind
    return kind


# Operations that create or describe tensors without work for the device.
_NO_KERNEL = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "detach_", "set_", "resize_"),
    *("device", "is_pinned", "sym_size", "sym_numel", "sym_stride", "record_stream", "lift_fresh"),
}


def _has_device_argument(args: tuple) -> bool:
    return any(isinstance(value, torch.Tensor) and value.device.type == "cuda" for value in tree_leaves(args))
