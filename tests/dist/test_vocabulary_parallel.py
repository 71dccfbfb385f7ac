"""Every objective at TP=2 against one process: loss, both gradients and the metrics.

Tolerances: 1e-10 in float64 and 1e-5 in float32, relative to the largest entry; what is left is the order of the sums, and
in float32 that a log-softmax over shards joins two normalizers.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from brute_force import cases
from ranks import run_ranks

pytestmark = pytest.mark.dist

# More candidates than a rank has ids, and all that there are.
WIDE = [
    replace(case, name=f"{case.name}, top {top_k}", top_k=top_k)
    for case in cases()
    if case.name in ("reverse_kl union tail", "forward_kl only_tch tail", "jsd only_stu tail")
    for top_k in (20, 29)
]
CASES = [*cases(), *WIDE]


def on_rank(rank, world_size, init_method):
    """Of every case and precision: loss, gradients of hidden states and of the weight's shard, and the metrics."""
    import torch
    import torch.distributed as dist
    from brute_force import PADDED, VOCABULARY, problem
    from objective_cases import objective_of, values_and_gradients

    from slime_opd.head.vocabulary import VocabularyShard

    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    rows = PADDED // world_size
    shard = VocabularyShard(rank * rows, VOCABULARY, dist.group.WORLD if world_size > 1 else None)
    found = {}
    for case in CASES:
        for dtype in (torch.float64, torch.float32):
            given = problem(case, dtype)
            hidden = given["hidden"].requires_grad_()
            weight = given["weight"][shard.start : shard.start + rows].clone().requires_grad_()
            objective = objective_of(case, given, hidden, weight, shard=shard)
            means = {name: [part.item() for part in pair] for name, pair in objective.means.items()}
            found[case.name, dtype] = [*values_and_gradients(objective, hidden, weight), means]
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("rendezvous")
    (alone,) = run_ranks(on_rank, 1, directory)
    return alone, run_ranks(on_rank, 2, directory)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_two_ranks_are_one_process(outcomes, name, dtype):
    import torch

    key, tolerance = (name, getattr(torch, dtype)), 1e-10 if dtype == "float64" else 1e-5
    alone, ranks = outcomes[0][key], [rank[key] for rank in outcomes[1]]

    def close(got, expected):
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * max(1.0, expected.abs().max().item()))

    for rank in ranks:
        close(rank[0], alone[0])
        close(rank[1], alone[1])
        assert rank[3] == ranks[0][3], "ranks disagree"
        for metric, pair in rank[3].items():
            assert pair == pytest.approx(alone[3][metric], rel=10 * tolerance, abs=10 * tolerance), metric
    close(torch.cat([rank[2] for rank in ranks]), alone[2])
