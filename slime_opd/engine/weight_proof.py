"""Proof that an engine serves the trainer's weights. This module runs inside the SGLang server.

An engine fuses, splits and shards the tensors that it loads, each model in its own way, so its parameters cannot be
compared with Hugging Face tensors by name. But loading is a deterministic function: an engine that already has the
trainer's tensors changes no bit when it loads them again. So the trainer sends its weights a second time, over the same
transport, and the engine records the effect:

1. begin: the trainer calls `/update_weights_from_tensor` with this module as the weight loader, and with the checksums
   of its tensors in place of tensors. The loader takes a checksum of every parameter of the engine and wraps the
   model's `load_weights`, through which SGLang loads the tensors of every transport.
2. The trainer sends all weights again. The wrapper takes a checksum of each tensor that arrives, then loads it.
3. finish: the trainer calls `/get_weights_by_name`, for which the loader gave the model a method of that name. It takes
   the checksums of the parameters again and returns the names of wrong tensors.

If every tensor arrived with the trainer's checksum and loading them changed no bit, the engine serves the trainer's
weights. Results are reported in step 3 only: SGLang ignores a loader's return value, and an exception in a loader ends
the server.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

LOADER = "slime_opd.engine.weight_proof.begin"
REPORT = "slime_opd.weight_proof"
# The kinds of wrong tensors in a report.
CHANGED, DIFFERENT, MISSING = "changed", "different", "missing"

# 4-byte integers per partial sum: few enough for a CPU's cache, enough for a GPU to hide its kernel launches.
_CHUNK = 1 << 18
_MULTIPLIER = -7046029254386353131  # 2^64 divided by the golden ratio, as a signed integer


def expected_tensors(checksums: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """The trainer's checksums by Hugging Face name, encoded as the one named tensor that `begin` takes."""
    return [("\n".join(checksums), _on_host(list(checksums.values())))]


def begin(model: Any, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Start to record what `model` loads. `named_tensors`: the result of `expected_tensors`."""
    ((names, checksums),) = named_tensors
    expected = dict(zip(names.split("\n"), checksums.tolist(), strict=True))
    # A proof that was begun and not finished has left its recorder.
    current = model.load_weights
    recorder = _Recorder(current.load_weights if isinstance(current, _Recorder) else current)
    before = _parameter_checksums(model)

    def finish(name: str, truncate_size: int = 0, tp_size: int = 1) -> dict[str, list[str]]:
        model.load_weights = recorder.load_weights
        del model.get_weights_by_name
        received = dict(zip(recorder.checksums, _on_host(list(recorder.checksums.values())).tolist(), strict=True))
        after = _parameter_checksums(model)
        report = {
            CHANGED: [name for name in after if after[name] != before.get(name)],
            DIFFERENT: [name for name in received if received[name] != expected.get(name)],
            MISSING: [name for name in expected if name not in received],
        }
        return _on_all_ranks(report)

    model.load_weights, model.get_weights_by_name = recorder, finish


class _Recorder:
    """A model's `load_weights` that also records the checksum of each tensor, by name."""

    def __init__(self, load_weights: Callable[..., Any]) -> None:
        self.load_weights = load_weights
        self.checksums: dict[str, Tensor] = {}

    def __call__(self, weights: Iterable[tuple[str, Tensor]], *args: Any, **kwargs: Any) -> Any:
        return self.load_weights(self._record(weights), *args, **kwargs)

    def _record(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            self.checksums[name] = checksum(tensor)
            yield name, tensor


def checksum(values: Tensor) -> Tensor:
    """Order-dependent checksum of a tensor's bits: int64 scalar on the tensor's device, the same on every device.

    It does not synchronise with the device. It is exact: sums and products modulo 2^64 do not depend on the order of
    evaluation.
    """
    octets = values.detach().contiguous().view(-1).view(torch.uint8)
    if octets.numel() % 4 or octets.storage_offset() % 4:
        octets = torch.cat([octets, octets.new_zeros(-octets.numel() % 4)])
    integers, factors = octets.view(torch.int32), _factors(octets.device)
    total = torch.full((), values.nbytes, dtype=torch.int64, device=octets.device)
    for start in range(0, integers.numel(), _CHUNK):
        chunk = integers[start : start + _CHUNK].to(torch.int64)
        total = total * _MULTIPLIER + chunk.mul_(factors[: chunk.numel()]).sum()
    return total


@functools.cache
def _factors(device: torch.device) -> Tensor:
    """Odd pseudo-random factors, int64 [_CHUNK]: with odd factors any change of a single element changes the sum."""
    positions = torch.arange(1, _CHUNK + 1, device=device) * _MULTIPLIER
    return (positions ^ (positions >> 29)) * _MULTIPLIER | 1


def _on_host(scalars: list[Tensor]) -> Tensor:
    """Scalars on any devices as one CPU tensor int64 [N]; synchronises with the device once."""
    return torch.stack([scalar.to(scalars[0].device) for scalar in scalars]).cpu() if scalars else torch.empty(0).long()


def _parameter_checksums(model: torch.nn.Module) -> dict[str, int]:
    checksums = {name: checksum(parameter) for name, parameter in model.named_parameters()}
    return dict(zip(checksums, _on_host(list(checksums.values())).tolist(), strict=True))


def _on_all_ranks(report: dict[str, list[str]]) -> dict[str, list[str]]:
    """The names that any tensor-parallel rank of the engine reports. Only rank 0 answers requests."""
    reports = [report]
    if torch.distributed.is_initialized():
        from sglang.srt.distributed import get_tp_group

        group = get_tp_group().cpu_group
        reports *= torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(reports, report, group=group)
    return {kind: sorted({name for rank_report in reports for name in rank_report[kind]}) for kind in report}
