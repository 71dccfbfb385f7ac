"""Host copies of weights that take turns in the one model on the device.

Student, reference and teacher have one architecture, so one model of device memory serves all three: their weights
wait in (pinned) host memory and are copied in for their forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from slime_opd.megatron import device


class WeightSnapshots:
    """Named host copies of one model's parameters and buffers."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
        self._copies: dict[str, list[torch.Tensor]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._copies

    def keep(self, name: str) -> None:
        """Copy the model's present weights to the host under `name`; a second call reuses the memory."""
        if name not in self._copies:
            self._copies[name] = [
                torch.empty_like(t, device="cpu", pin_memory=device.has_cuda()) for t in self._tensors
            ]
        for copy, tensor in zip(self._copies[name], self._tensors, strict=True):
            copy.copy_(tensor.detach(), non_blocking=True)
        device.synchronize()

    @torch.no_grad()
    def restore(self, name: str) -> None:
        """Copy the weights kept under `name` into the model."""
        for copy, tensor in zip(self._copies[name], self._tensors, strict=True):
            tensor.data.copy_(copy, non_blocking=True)
        device.synchronize()

    @contextmanager
    def swapped_in(self, *names: str) -> Iterator[Iterator[str]]:
        """Yield an iterator that puts each of `names` into the model in turn; afterwards the student is back."""
        self.keep("student")
        try:
            yield self._in_turn(names)
        finally:
            self.restore("student")

    def _in_turn(self, names: tuple[str, ...]) -> Iterator[str]:
        for name in names:
            self.restore(name)
            yield name


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
