"""Cutting a model's weights into pieces that fit a buffer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

NamedTensor = tuple[str, Tensor]


def buckets(weights: Iterable[NamedTensor], limit: int) -> Iterator[list[NamedTensor]]:
    """Group weights, in order, into lists of at most `limit` bytes; a larger tensor comes alone."""
    bucket: list[NamedTensor] = []
    size = 0
    for name, tensor in weights:
        if bucket and size + tensor.nbytes > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket
