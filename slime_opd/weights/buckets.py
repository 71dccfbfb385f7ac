"""Groups a model's weights into buckets of limited size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

NamedTensor = tuple[str, Tensor]


def buckets(weights: Iterable[NamedTensor], max_bytes: int) -> Iterator[list[NamedTensor]]:
    """Group weights, in order, into lists of at most `max_bytes`; a larger tensor is a list of its own."""
    bucket: list[NamedTensor] = []
    size = 0
    for name, tensor in weights:
        if bucket and size + tensor.nbytes > max_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket
