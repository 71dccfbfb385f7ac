"""Copies of weights that share the one model on the device.

Student, reference and teacher have one architecture, so one model serves all three. Their weights wait in (pinned) host
memory and are copied in for their forward pass; or they stay on the device, and change places with the student's.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from slime_opd.model import device

_STUDENT = "student"


class WeightSnapshots:
    """Named copies of one model's parameters and buffers.

    A model that moves to other memory afterwards, as into an optimizer's buffers, may still change places with them.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
        self._copies: dict[str, list[torch.Tensor]] = {}
        self._resident: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._copies

    def keep(self, name: str, *, resident: bool = False) -> None:
        """Copy the model's present weights to the host under `name`, or (resident) to other memory of the device.

        A second call reuses the memory. Where the device is the CPU both are one, and nothing needs to be copied back.
        """
        if name not in self._copies:
            if resident or not device.has_cuda():
                self._resident.add(name)
                self._copies[name] = [torch.empty_like(t) for t in self._tensors]
            else:
                self._copies[name] = [torch.empty_like(t, device="cpu", pin_memory=True) for t in self._tensors]
        for copy, tensor in zip(self._copies[name], self._tensors, strict=True):
            copy.copy_(tensor.detach(), non_blocking=True)
        device.synchronize()

    @contextmanager
    def swapped_in(self, *names: str) -> Iterator[Iterator[str]]:
        """Yield an iterator that puts each of `names` into the model in turn; afterwards the student is back."""
        from_host = [name for name in names if name not in self._resident]
        if from_host:
            self.keep(_STUDENT)
        in_turn = self._in_turn(names)
        try:
            yield in_turn
        finally:
            # An error leaves the iterator in the middle of a turn.
            in_turn.close()
            if from_host:
                self._restore(_STUDENT)

    def _in_turn(self, names: tuple[str, ...]) -> Generator[str, None, None]:
        for name in names:
            if name in self._resident:
                self._exchange(name)
                try:
                    yield name
                finally:
                    self._exchange(name)
            else:
                self._restore(name)
                yield name

    @torch.no_grad()
    def _restore(self, name: str) -> None:
        for copy, tensor in zip(self._copies[name], self._tensors, strict=True):
            tensor.data.copy_(copy, non_blocking=True)
        device.synchronize()

    def _exchange(self, name: str) -> None:
        """The model takes the memory kept under `name`, which takes the model's."""
        for copy, tensor in zip(self._copies[name], self._tensors, strict=True):
            copy.data, tensor.data = tensor.data, copy.data


@torch.no_grad()
def fingerprint(model: torch.nn.Module) -> tuple[float, float]:
    """Sum and sum of squares of all weights over all ranks, in float64.

    Two models with one fingerprint are, for every practical purpose, the same weights: that is how a teacher that
    was not really loaded is noticed. Ranks that hold the same weights count as often for every model.
    """
    sums = torch.zeros(2, dtype=torch.float64)
    for parameter in model.parameters():
        values = parameter.detach().double()
        sums += torch.stack([values.sum(), values.square().sum()]).cpu()
    sums = sums.to(device.device())
    dist.all_reduce(sums)
    total, squares = sums.tolist()
    return total, squares
