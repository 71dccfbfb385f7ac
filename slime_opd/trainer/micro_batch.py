"""Micro-batches: packed rows on the device, with their fields as tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slime_opd import fields
from slime_opd.model.attention import PackedSequences, packed_sequences
from slime_opd.types import RolloutBatch, TrainBatch


@dataclass(frozen=True)
class MicroBatch:
    """Samples packed into one row; no token is padding, but for those at the end that sequence parallelism needs.

    tokens, position_ids: int64 [1, T]. `predicting`: int64 [R], the index in the row of the hidden state that predicts
    each response token (the token before it). `targets`: int64 [R], those response tokens. `columns`: the
    response-level fields of the samples, [R] or [R, K]. `response_lengths`: int64 [N]. `rows`: the R response tokens
    within the TrainBatch's columns.
    """

    tokens: Tensor
    position_ids: Tensor
    packed: PackedSequences
    predicting: Tensor
    targets: Tensor
    columns: dict[str, Tensor]
    response_lengths: Tensor
    rows: slice


def micro_batches(
    batch: TrainBatch, device: torch.device, steps: slice = slice(None), *, multiple: int = 1
) -> Iterator[MicroBatch]:
    """The micro-batches of the chosen optimizer steps, in order; each row's length is a multiple of `multiple`."""
    first = sum(sum(sizes) for sizes in batch.steps[: steps.start or 0])
    offsets = np.concatenate([[0], np.cumsum(batch.samples.response_lengths)])
    for sizes in batch.steps[steps]:
        for size in sizes:
            chosen = np.arange(first, first + size)
            rows = slice(int(offsets[first]), int(offsets[first + size]))
            first += size
            yield pack(batch.samples.select(chosen), rows, device, multiple)


def pack(samples: RolloutBatch, rows: slice, device: torch.device, multiple: int = 1) -> MicroBatch:
    """Lay samples end to end in one row on `device`; a segment of padding makes its length a multiple."""
    lengths = samples.total_lengths
    starts = np.cumsum(lengths) - lengths
    position_ids = np.arange(len(samples.tokens)) - np.repeat(starts, lengths)
    is_response = position_ids >= np.repeat(samples.prompt_lengths, lengths)
    tokens, missing = samples.tokens, -len(samples.tokens) % multiple
    if missing:
        tokens = np.concatenate([tokens, np.zeros(missing, tokens.dtype)])
        position_ids = np.concatenate([position_ids, np.arange(missing)])
        lengths = np.append(lengths, missing)
    response = np.flatnonzero(is_response)

    def put(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)

    return MicroBatch(
        tokens=put(tokens)[None],
        position_ids=put(position_ids)[None],
        packed=packed_sequences(lengths.tolist(), device),
        predicting=put(response - 1),
        targets=put(samples.tokens[response]),
        columns={
            name: put(values) for name, values in samples.columns.items() if fields.field(name).level == fields.RESPONSE
        },
        response_lengths=put(samples.response_lengths),
        rows=rows,
    )
