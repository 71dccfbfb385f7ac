"""GPUs as bundles: what shares a node, and the sentence where a cluster cannot hold them."""

from __future__ import annotations

import pytest

from slime_opd.cluster.bundles import Bundles, in_rank_order


def bundles(nodes=2, ranks_per_node=4, engines=4, gpus_per_engine=2, is_colocated=False) -> Bundles:
    return Bundles(nodes, ranks_per_node, engines, gpus_per_engine, is_colocated)


def test_the_ranks_of_a_node_are_one_bundle_and_each_engine_is_one():
    plan = bundles()
    assert plan.gpus == [4, 4, 2, 2, 2, 2]
    assert [plan.bundle_of_rank(rank) for rank in range(8)] == [0] * 4 + [1] * 4
    assert [plan.bundle_of_engine(engine) for engine in range(4)] == [2, 3, 4, 5]


def test_a_colocated_engine_is_in_the_bundle_of_its_ranks():
    plan = bundles(is_colocated=True)
    assert plan.gpus == [4, 4]
    assert [plan.bundle_of_engine(engine) for engine in range(4)] == [0, 0, 1, 1]


def test_processes_are_numbered_by_bundle_then_by_gpu_as_a_number():
    places = [(1, "2"), (0, "10"), (0, "9"), (1, "GPU-b"), (1, "GPU-a")]
    assert in_rank_order(places) == [2, 1, 0, 4, 3]


@pytest.mark.parametrize(
    ("plan", "nodes", "problem"),
    [
        (bundles(), {"a": 8, "b": 8}, None),
        (bundles(), {"a": 8, "b": 7}, "needs 16 GPUs (2 × 4 to train, 4 × 2 to generate), the Ray cluster has 15 (8 on a, 7 on b)"),
        (bundles(is_colocated=True), {"a": 4, "b": 3}, "needs 8 GPUs (2 × 4 to train), the Ray cluster has 7"),
        (bundles(1, 8, 1, 1), {"a": 6, "b": 6}, "--actor-num-gpus-per-node 8: no node of the Ray cluster has so many GPUs (6 on a, 6 on b)"),
        (bundles(1, 2, 1, 8), {"a": 6, "b": 6}, "--rollout-num-gpus-per-engine 8: no node"),
        (bundles(1, 1, 0, 1), {}, "the Ray cluster has 0 (none)"),
    ],
)  # fmt: skip
def test_a_cluster_that_can_never_hold_the_bundles_is_refused(plan, nodes, problem):
    found = plan.problem(nodes)
    assert found is None if problem is None else problem in found


def test_a_run_that_only_generates_needs_no_gpu_to_train():
    plan = bundles(nodes=0, ranks_per_node=4, engines=2, gpus_per_engine=1)
    assert plan.gpus == [1, 1]
    assert plan.problem({"box": 2}) is None
    assert "0 ×" not in plan.problem({"box": 1})
