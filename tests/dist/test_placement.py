"""Slots on a real Ray cluster of two pretended nodes with eight pretended GPUs each: which node and GPUs a process gets."""

from __future__ import annotations

import pytest
import ray

from slime_opd.cluster import session
from slime_opd.cluster.bundles import in_rank_order
from slime_opd.config import parse
from slime_opd.errors import ConfigError


@ray.remote
class Reporter:
    """Stands for a trainer rank or an engine."""

    def place(self) -> tuple[str, list[str]]:
        """The node, and the ids of the GPUs that Ray gave this process."""
        return ray.get_runtime_context().get_node_id(), [str(gpu) for gpu in ray.get_gpu_ids()]


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory):
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        for _ in range(2):
            cluster.add_node(num_gpus=8, num_cpus=0, include_dashboard=False, object_store_memory=80 * 1024**2)
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


class Placed:
    """The processes of a run, placed as its slots say."""

    def __init__(self, flags: str) -> None:
        self.placement = session.reserve(parse(flags.split()), timeout_s=30)
        slots = [*self.placement.trainers, *self.placement.engines]
        self._actors = [Reporter.options(**slot.options).remote() for slot in slots]
        places = ray.get([actor.place.remote() for actor in self._actors], timeout=60)
        trainers, self.engines = places[: len(self.placement.trainers)], places[len(self.placement.trainers) :]
        bundles = [slot.bundle for slot in self.placement.trainers]
        order = in_rank_order([(bundle, gpus[0]) for bundle, (_, gpus) in zip(bundles, trainers, strict=True)])
        self.trainers = [trainers[index] for index in order]

    def __enter__(self) -> Placed:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self.placement.release()


def test_ranks_of_a_node_are_consecutive_and_no_engine_straddles_nodes(two_nodes):
    flags = "--actor-num-nodes 2 --actor-num-gpus-per-node 5 --rollout-num-gpus 6 --rollout-num-gpus-per-engine 3"
    with Placed(flags) as placed:
        groups = [placed.trainers[:5], placed.trainers[5:]]
        nodes = [{node for node, _ in group} for group in groups]
        assert [len(own) for own in nodes] == [1, 1] and nodes[0] != nodes[1]
        for group in groups:
            numbers = [int(gpu) for _, (gpu,) in group]
            assert numbers == sorted(numbers)
        assert [len(gpus) for _, gpus in placed.engines] == [3, 3]
        taken = [(node, gpu) for node, gpus in [*placed.trainers, *placed.engines] for gpu in gpus]
        assert len(set(taken)) == len(taken) == 16
        with pytest.raises(ConfigError) as error:
            session.reserve(parse(["--actor-num-gpus-per-node", "2"]), timeout_s=0.5)
    hosts = [node["NodeID"][:8] for node in ray.nodes()]
    message = str(error.value)
    assert "the run needs 3 GPUs (1 × 2 to train, 1 × 1 to generate), and they did not become free within 0.5 s" in message
    assert message.count("0 on ") == 2 and all(host in message for host in hosts)


def test_colocated_engines_are_on_the_node_of_their_ranks(two_nodes):
    flags = "--actor-num-nodes 2 --actor-num-gpus-per-node 5 --colocate --rollout-num-gpus-per-engine 5"
    with Placed(flags) as placed:
        assert len(placed.engines) == 2
        for index, (node, gpus) in enumerate(placed.engines):
            ranks = placed.trainers[5 * index : 5 * index + 5]
            assert {rank_node for rank_node, _ in ranks} == {node} and gpus == []
        assert placed.engines[0][0] != placed.engines[1][0]


def test_what_no_node_can_hold_is_refused_at_once(two_nodes):
    with pytest.raises(
        ConfigError, match=r"--actor-num-gpus-per-node 9: no node of the Ray cluster has so many GPUs \(8 "
    ):
        session.reserve(parse(["--actor-num-gpus-per-node", "9"]))


def test_servers_on_two_nodes_listen_on_their_nodes_with_a_key(two_nodes):
    access = session.server_access()
    assert not access.loopback_only and access.key
    assert session.devices().has_gpus
