"""Which samples train together: optimizer steps, data-parallel ranks, micro-batches. Pure, on lengths alone."""

from __future__ import annotations

import heapq

import numpy as np

from slime_opd.errors import DataError


def plan_steps(num_samples: int, global_batch_size: int) -> list[np.ndarray]:
    """Indices of the samples of each optimizer step, in order; every step has `global_batch_size` of them."""
    if global_batch_size < 1 or num_samples % global_batch_size:
        raise DataError(
            f"{num_samples} samples do not divide into steps of {global_batch_size}; change --global-batch-size or --rollout-batch-size"
        )
    return list(np.arange(num_samples).reshape(-1, global_batch_size))


def plan_micro_batches(
    lengths: np.ndarray,
    *,
    data_parallel_size: int,
    max_tokens: int | None = None,
    micro_batch_size: int | None = None,
) -> list[list[np.ndarray]]:
    """Micro-batches of each rank, as indices into `lengths` (tokens per sample, int64 [n]).

    With `max_tokens` a micro-batch holds at most that many tokens, unless one sample alone is longer; else it holds at most
    `micro_batch_size` samples. All ranks get the same number of micro-batches, as the pipeline schedule and the collectives
    need, and ranks are balanced by tokens. Raises DataError when the samples do not divide by the ranks.
    """
    if len(lengths) == 0 or len(lengths) % data_parallel_size:
        raise DataError(
            f"{len(lengths)} samples cannot be split over {data_parallel_size} data-parallel ranks; change --global-batch-size"
        )
    if max_tokens is not None:
        bins = _first_fit(lengths, max_tokens)
    else:
        longest_first = np.argsort(-lengths, kind="stable")
        bins = [list(part) for part in np.array_split(longest_first, -(-len(lengths) // micro_batch_size))]
    _split_until_even(bins, lengths, data_parallel_size)
    return [[np.sort(np.asarray(one)) for one in of_rank] for of_rank in _balanced(bins, lengths, data_parallel_size)]


def _first_fit(lengths: np.ndarray, max_tokens: int) -> list[list[int]]:
    """First fit, longest sample first: each into the first bin with room, found through a tree of free room."""
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    room = [max_tokens] * (2 * leaves)
    bins: list[list[int]] = []
    for index in np.argsort(-lengths, kind="stable").tolist():
        need = min(int(lengths[index]), max_tokens)
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= need else 2 * node + 1
        if node - leaves == len(bins):
            bins.append([])
        bins[node - leaves].append(index)
        room[node] -= need
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins


def _split_until_even(bins: list[list[int]], lengths: np.ndarray, ranks: int) -> None:
    """Halve the bins with the most tokens until their number divides by `ranks`."""
    while len(bins) % ranks:
        largest = max((one for one in bins if len(one) > 1), key=lambda one: int(lengths[one].sum()))
        bins.remove(largest)
        ordered = sorted(largest, key=lambda index: -int(lengths[index]))
        bins += [ordered[::2], ordered[1::2]]


def _balanced(bins: list[list[int]], lengths: np.ndarray, ranks: int) -> list[list[list[int]]]:
    """Hand out bins, most tokens first, to the rank with the fewest tokens that has room for one more bin."""
    per_rank = len(bins) // ranks
    assigned: list[list[list[int]]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for one in sorted(bins, key=lambda one: -int(lengths[one].sum())):
        load, rank = heapq.heappop(loads)
        assigned[rank].append(one)
        if len(assigned[rank]) < per_rank:
            heapq.heappush(loads, (load + int(lengths[one].sum()), rank))
    return assigned
