"""Joining Ray, and reserving the devices of a run."""

from __future__ import annotations

from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from slime_opd import lifetimes
from slime_opd.cluster.access import Access, access_for
from slime_opd.cluster.private_cluster import is_inside_job
from slime_opd.config import Config
from slime_opd.config.check_sizes import process_problem
from slime_opd.errors import ConfigError
from slime_opd.stopping import daemons_apart

PLACEMENT_TIMEOUT_S = 120


@dataclass(frozen=True)
class Slot:
    """Where one process runs, as options of a Ray actor."""

    options: dict

    def options_in(self, name: str, variables: dict[str, str] | None = None) -> dict:
        """These options for an actor with environment variables of its own and the scope `name` below this run's."""
        scope = lifetimes.environment_of(f"{lifetimes.own()}/{name}")
        return {**self.options, "runtime_env": {"env_vars": {**(variables or {}), **scope}}}


@dataclass(frozen=True)
class Placement:
    """The reserved devices: one slot per trainer rank and one per engine."""

    trainers: list[Slot]
    engines: list[Slot]
    group: PlacementGroup | None

    def release(self) -> None:
        """Give the devices back."""
        if self.group is not None:
            remove_placement_group(self.group)


def join(address: str) -> None:
    """Join the Ray cluster at `address`, or start one for this process with "local"."""
    if ray.is_initialized():
        return
    try:
        with daemons_apart():
            ray.init(
                address=None if is_inside_job() else address,
                log_to_driver=True,
                include_dashboard=False if address == "local" else None,
            )
    except ConnectionError as error:
        raise ConfigError(
            f"--ray-address {address}: no Ray cluster answers there; start one with `ray start --head`, or say --ray-address local"
        ) from error


def reserve(config: Config) -> Placement:
    """Reserve a GPU for every trainer rank and engine; where there is no CUDA, plain processes on any node.

    With --colocate an engine stands on the GPUs of trainer ranks. Raises ConfigError when the cluster has too few.
    """
    trainers, engines = config.world_size, config.num_engines if needs_engines(config) else 0
    if not ray.cluster_resources().get("GPU"):
        cores = int(ray.cluster_resources().get("CPU", 0))
        if problem := process_problem(trainers, engines * config.cluster.rollout_num_gpus_per_engine, cores):
            raise ConfigError(problem)
        return Placement([Slot({"num_cpus": 0})] * trainers, [Slot({"num_cpus": 0})] * engines, None)
    per_engine = config.cluster.rollout_num_gpus_per_engine
    # A colocated engine stands on GPUs that its trainer ranks hold, so it reserves none.
    own_gpus = 0 if config.cluster.colocate else per_engine
    total, available = trainers + engines * own_gpus, int(ray.cluster_resources()["GPU"])
    if total > available:
        raise ConfigError(
            f"the run needs {total} GPUs ({trainers} to train, {engines * own_gpus} to generate), the Ray cluster has {available}; change --actor-num-gpus-per-node or --rollout-num-gpus"
        )
    bundles = [{"GPU": 1, "CPU": 1}] * trainers
    bundles += [{"GPU": own_gpus, "CPU": 1}] * (engines if own_gpus else 0)
    group = placement_group(bundles, strategy="PACK")
    ray.get(group.ready(), timeout=PLACEMENT_TIMEOUT_S)

    def slot(bundle: int, gpus: int) -> Slot:
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
        return Slot({"num_cpus": 0, "num_gpus": gpus, "scheduling_strategy": strategy})

    return Placement(
        [slot(rank, 1) for rank in range(trainers)],
        [slot(trainers + engine if own_gpus else engine * per_engine, own_gpus) for engine in range(engines)],
        group,
    )


def server_access() -> Access:
    """How the servers of this run are reached, given the nodes of the Ray cluster."""
    return access_for(node["NodeID"] for node in ray.nodes() if node["Alive"])


def needs_engines(config: Config) -> bool:
    """Whether anything is generated: by a rollout, or by an evaluation."""
    return not config.is_sft or bool(config.evaluation.eval_prompt_data)
