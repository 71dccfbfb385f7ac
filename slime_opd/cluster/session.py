"""Join a Ray cluster, and reserve the devices of a run in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from slime_opd import lifetimes
from slime_opd.cluster.access import Access, access_for
from slime_opd.cluster.bundles import Bundles
from slime_opd.cluster.deaths import first_sentence
from slime_opd.cluster.environment import Devices
from slime_opd.cluster.private_cluster import is_inside_job
from slime_opd.config import Config
from slime_opd.errors import ConfigError, ProcessDied
from slime_opd.preflight.check_sizes import process_problem
from slime_opd.stopping import keep_handlers_while_starting_ray

PLACEMENT_TIMEOUT_S = 120


@dataclass(frozen=True)
class Slot:
    """Ray actor options that place one process. `bundle`: the index of its bundle of GPUs; None without GPUs."""

    options: dict
    bundle: int | None = None

    def options_in(self, name: str, variables: Mapping[str, str] | None = None) -> dict:
        """The options for an actor with these environment variables and the scope `name` below the run's scope."""
        scope = lifetimes.scope_environment(f"{lifetimes.own()}/{name}")
        return {**self.options, "runtime_env": {"env_vars": {**(variables or {}), **scope}}}


@dataclass(frozen=True)
class Placement:
    """The reserved devices: one slot per trainer rank and one per engine."""

    trainers: list[Slot]
    engines: list[Slot]
    group: PlacementGroup | None

    @property
    def has_gpus(self) -> bool:
        """Whether the processes run on GPUs."""
        return self.group is not None

    def release(self) -> None:
        """Release the devices."""
        if self.group is not None:
            remove_placement_group(self.group)


def join(address: str) -> None:
    """Join the Ray cluster at `address`, or start one for this process with "local".

    Raises ConfigError if the cluster does not answer or refuses this process, ProcessDied if Ray does not start.
    """
    if ray.is_initialized():
        return
    try:
        with keep_handlers_while_starting_ray():
            ray.init(
                address=None if is_inside_job() else address,
                log_to_driver=True,
                include_dashboard=False if address == "local" else None,
            )
    except ConnectionError as error:
        raise ConfigError(
            f"--ray-address {address}: no Ray cluster answers there; "
            "start one with `ray start --head`, or use --ray-address local"
        ) from error
    except Exception as error:  # Ray raises plain Exception too, for example if its raylet was killed at the start
        if address == "local":
            raise ProcessDied(f"Ray did not start on this machine: {first_sentence(str(error))}") from error
        raise ConfigError(
            f"--ray-address {address}: the Ray cluster cannot be joined: {first_sentence(str(error))}"
        ) from error


def reserve(config: Config, timeout_s: float = PLACEMENT_TIMEOUT_S) -> Placement:
    """Reserve GPUs for every trainer rank and engine; in a cluster without GPUs, processes on any node.

    The ranks of a node are one bundle, and each engine is one, so that neither spans nodes. With --colocate an engine
    is in the bundle of its ranks. Raises ConfigError if the cluster has too few GPUs, or they do not become free within
    `timeout_s` seconds.
    """
    nodes = 0 if config.debug.debug_rollout_only else config.cluster.actor_num_nodes
    trainers = nodes * config.cluster.actor_num_gpus_per_node
    engines = config.num_engines if config.needs_engines else 0
    if not ray.cluster_resources().get("GPU"):
        cores = int(ray.cluster_resources().get("CPU", 0))
        if problem := process_problem(trainers, engines * config.cluster.rollout_num_gpus_per_engine, cores):
            raise ConfigError(problem)
        return Placement([Slot({"num_cpus": 0})] * trainers, [Slot({"num_cpus": 0})] * engines, None)
    cluster = config.cluster
    plan = Bundles(
        nodes=nodes,
        ranks_per_node=cluster.actor_num_gpus_per_node,
        engines=engines,
        gpus_per_engine=cluster.rollout_num_gpus_per_engine,
        is_colocated=cluster.colocate and nodes > 0,
    )
    if problem := plan.problem(_gpus_of_nodes()):
        raise ConfigError(problem)
    # PACK: as few nodes as possible. STRICT_PACK would refuse a run on several nodes.
    group = placement_group([{"GPU": gpus} for gpus in plan.gpus], strategy="PACK")
    try:
        ray.get(group.ready(), timeout=timeout_s)
    except ray.exceptions.GetTimeoutError as error:
        remove_placement_group(group)
        raise ConfigError(plan.timeout_message(_free_gpus_of_nodes(), timeout_s)) from error

    def slot(bundle: int, gpus: int) -> Slot:
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
        return Slot({"num_cpus": 0, "num_gpus": gpus, "scheduling_strategy": strategy}, bundle)

    own_gpus = 0 if plan.is_colocated else plan.gpus_per_engine
    return Placement(
        [slot(plan.bundle_of_rank(rank), 1) for rank in range(trainers)],
        [slot(plan.bundle_of_engine(engine), own_gpus) for engine in range(engines)],
        group,
    )


def _gpus_of_nodes() -> dict[str, int]:
    """Number of GPUs of each living node that has any, by the node's name for messages."""
    gpus = {_node_name(node): int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]}
    return {name: count for name, count in gpus.items() if count}


def _free_gpus_of_nodes() -> dict[str, int]:
    """Number of free GPUs of each living node with GPUs. Ray has no public function for it."""
    available = ray._private.state.available_resources_per_node()
    return {
        _node_name(node): int(available.get(node["NodeID"], {}).get("GPU", 0))
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("GPU")
    }


def _node_name(node: dict) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:8]})"


def server_access() -> Access:
    """Access to the servers of this run, by the number of nodes in the Ray cluster."""
    return access_for(node["NodeID"] for node in ray.nodes() if node["Alive"])


def devices() -> Devices:
    """The devices of the Ray cluster."""
    return Devices.of_resources(ray.cluster_resources())
