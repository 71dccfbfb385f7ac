"""Slots on a real Ray cluster of two simulated nodes with eight simulated GPUs each: which node and GPUs a process gets."""

from __future__ import annotations

import pytest
import ray

from slime_opd.cluster import session
from slime_opd.cluster.bundles import in_rank_order
from slime_opd.config import parse
from slime_opd.errors import ConfigError


pytestmark = pytest.mark.dist


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
    """The reserved slots of a run, and processes in some of them, as each takes a second to start."""

    def __init__(self, flags: str, ranks: list[int]) -> None:
        self.placement = session.reserve(parse(flags.split()), timeout_s=60)
        slots = [*(self.placement.trainers[rank] for rank in ranks), *self.placement.engines]
        self._actors = [Reporter.options(**slot.options).remote() for slot in slots]
        places = ray.get([actor.place.remote() for actor in self._actors], timeout=240)
        self.ranks, self.engines = places[: len(ranks)], places[len(ranks) :]
        self.bundles = [slot.bundle for slot in self.placement.trainers]

    def __enter__(self) -> Placed:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self.placement.release()


def test_ranks_of_a_node_are_consecutive_and_no_engine_straddles_nodes(two_nodes):
    flags = "--actor-num-nodes 2 --actor-num-gpus-per-node 5 --rollout-num-gpus 6 --rollout-num-gpus-per-engine 3"
    with Placed(flags, ranks=[0, 4, 5, 9]) as placed:
        assert placed.bundles == [0] * 5 + [1] * 5
        first, last, *others = (node for node, _ in placed.ranks)
        assert first == last and set(others) == {node["NodeID"] for node in ray.nodes()} - {first}
        order = in_rank_order([(placed.bundles[rank], placed.ranks[i][1][0]) for i, rank in enumerate((0, 4, 5, 9))])
        ordered = [placed.ranks[index] for index in order]
        assert [node for node, _ in ordered] == [first, first, *others]
        numbers = [int(gpu) for _, (gpu,) in ordered]
        assert numbers[0] < numbers[1] and numbers[2] < numbers[3]
        assert [len(gpus) for _, gpus in placed.engines] == [3, 3]
        taken = [(node, gpu) for node, gpus in [*placed.ranks, *placed.engines] for gpu in gpus]
        assert len(set(taken)) == len(taken) == 4 + 6
        with pytest.raises(ConfigError) as error:
            session.reserve(parse(["--actor-num-gpus-per-node", "2"]), timeout_s=0.5)
    hosts = [node["NodeID"][:8] for node in ray.nodes()]
    message = str(error.value)
    assert "the run needs 3 GPUs (1 × 2 to train, 1 × 1 to generate), and they did not become free within 0.5 s" in message
    assert message.count("0 on ") == 2 and all(host in message for host in hosts)


def test_colocated_engines_are_on_the_node_of_their_ranks(two_nodes):
    flags = "--actor-num-nodes 2 --actor-num-gpus-per-node 5 --colocate --rollout-num-gpus-per-engine 5"
    with Placed(flags, ranks=[0, 5]) as placed:
        assert [node for node, _ in placed.engines] == [node for node, _ in placed.ranks]
        assert len({node for node, _ in placed.engines}) == 2
        # Its GPUs are those of its ranks, which it is told when it starts.
        assert [gpus for _, gpus in placed.engines] == [[], []]


def test_what_no_node_can_hold_is_refused_at_once(two_nodes):
    with pytest.raises(
        ConfigError, match=r"--actor-num-gpus-per-node 9: no node of the Ray cluster has so many GPUs \(8 "
    ):
        session.reserve(parse(["--actor-num-gpus-per-node", "9"]))


def test_servers_on_two_nodes_listen_on_their_nodes_with_a_key(two_nodes):
    access = session.server_access()
    assert not access.loopback_only and access.key
    assert session.devices().has_gpus
