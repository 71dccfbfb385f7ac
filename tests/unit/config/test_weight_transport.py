"""Which transport a run uses, and what is refused because it could not reach the engines."""

from __future__ import annotations

import pytest

from slime_opd.config import stages
from slime_opd.config.config import Config
from slime_opd.config.weight_transport import memory_sources, weight_transport
from slime_opd.errors import ConfigError


def config(transport: str = "auto", **cluster) -> Config:
    return Config(
        cluster=stages.ClusterConfig(**cluster), weights=stages.WeightsConfig(update_weight_transport=transport)
    )


@pytest.mark.parametrize(
    ("has_gpus", "cluster", "expected"),
    [
        (False, {}, "tensor"),
        (False, {"colocate": True, "actor_num_gpus_per_node": 2}, "tensor"),
        (False, {"actor_num_nodes": 2}, "broadcast"),
        (True, {}, "broadcast"),
        (True, {"colocate": True, "actor_num_gpus_per_node": 8}, "tensor"),
        (True, {"colocate": True, "actor_num_gpus_per_node": 8, "actor_num_nodes": 2}, "tensor"),
    ],
)
def test_auto_shares_memory_where_an_engine_can_open_it(has_gpus, cluster, expected):
    assert weight_transport(config(**cluster), has_gpus=has_gpus) == expected
    assert weight_transport(config("disk", **cluster), has_gpus=has_gpus) == "disk"


@pytest.mark.parametrize(
    ("transport", "has_gpus", "cluster", "message"),
    [
        ("tensor", True, {}, "--update-weight-transport tensor: the engines have GPUs of their own"),
        ("tensor", False, {"actor_num_nodes": 2}, "tensor: on CPUs it is shared memory of one node, found --actor-num-nodes 2"),
        ("broadcast", True, {"colocate": True}, "transport broadcast: NCCL's group takes a GPU once, .*; use tensor or disk"),
    ],
)  # fmt: skip
def test_what_could_not_reach_the_engines_is_refused_by_name(transport, has_gpus, cluster, message):
    with pytest.raises(ConfigError, match=message):
        weight_transport(config(transport, **cluster), has_gpus=has_gpus)


def test_each_engine_rank_opens_the_memory_of_the_trainer_rank_on_its_gpu_or_of_the_first():
    colocated = {"colocate": True, "actor_num_gpus_per_node": 4, "rollout_num_gpus_per_engine": 2}
    assert memory_sources(config(**colocated)) == [[0, 1], [2, 3]]
    assert memory_sources(config(rollout_num_gpus=3)) == [[0], [0], [0]]
