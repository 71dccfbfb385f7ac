"""Vocabulary-parallel log-probs at TP=2 against one process, in float64: values and both gradients."""

from __future__ import annotations

import pytest
from ranks import run_ranks

pytestmark = pytest.mark.dist

TOKENS, HIDDEN, VOCABULARY, PADDED = 9, 6, 13, 32


def problem():
    import torch

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(PADDED, HIDDEN, generator=generator, dtype=torch.float64)
    upstream = torch.randn(2, TOKENS, generator=generator, dtype=torch.float64)
    return hidden, weight, torch.randint(0, VOCABULARY, (TOKENS,), generator=generator), upstream


def on_rank(rank, world_size, init_method):
    import torch
    import torch.distributed as dist

    from slime_opd.megatron.linear_log_probs import VocabularyShard, linear_log_probs

    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    hidden, weight, targets, upstream = problem()
    rows = PADDED // world_size
    # The second rank's sixteen rows are all padding: 13 ids are real.
    local = weight[rank * rows : (rank + 1) * rows].clone().requires_grad_()
    hidden.requires_grad_()
    shard = VocabularyShard(rank * rows, VOCABULARY, dist.group.WORLD if world_size > 1 else None)
    log_probs, entropy = linear_log_probs(hidden, local, targets, shard, temperature=0.9, chunk_size=4)
    (torch.stack([log_probs, entropy]) * upstream).sum().backward()
    return [x.detach() for x in (log_probs, entropy, hidden.grad, local.grad)]


def test_values_and_gradients_equal_one_process(tmp_path):
    import torch

    (alone,) = run_ranks(on_rank, 1, tmp_path)
    ranks = run_ranks(on_rank, 2, tmp_path)
    for rank in ranks:
        for got, expected in zip(rank[:3], alone[:3], strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat([rank[3] for rank in ranks]), alone[3], rtol=0, atol=1e-12)
