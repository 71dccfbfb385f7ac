"""How weights travel from the trainer to the engines, decided from the options and from whether there are GPUs."""

from __future__ import annotations

from slime_opd.config.config import Config
from slime_opd.errors import ConfigError


def weight_transport(config: Config, *, has_gpus: bool) -> str:
    """The transport of a run: "tensor", "broadcast" or "disk". Raises ConfigError where it cannot reach the engines."""
    requested = config.weights.update_weight_transport
    problem = _tensor_problem(config, has_gpus)
    if requested == "tensor" and problem is not None:
        raise ConfigError(f"--update-weight-transport tensor: {problem}")
    chosen = requested if requested != "auto" else "tensor" if problem is None else "broadcast"
    if chosen == "broadcast" and config.cluster.colocate and has_gpus:
        raise ConfigError(
            "--update-weight-transport broadcast: NCCL's group takes a GPU once, and with --colocate trainer and engines share theirs; use tensor or disk"
        )
    return chosen


def _tensor_problem(config: Config, has_gpus: bool) -> str | None:
    """Why the engines cannot open the memory of trainer ranks; None where they can."""
    cluster = config.cluster
    if not has_gpus and cluster.actor_num_nodes > 1:
        return f"on CPUs it is shared memory of one node, found --actor-num-nodes {cluster.actor_num_nodes}; use broadcast or disk"
    if has_gpus and not cluster.colocate:
        return "the engines have GPUs of their own and cannot open memory of the trainer's; use broadcast or disk, or --colocate"
    return None


def memory_sources(config: Config) -> list[list[int]]:
    """By engine, and by rank of the engine: the trainer rank whose memory it opens with the transport "tensor".

    With --colocate that is the trainer rank on its own GPU (EngineGroup gives an engine the GPUs of consecutive trainer
    ranks); else, on CPUs, the first trainer rank, whose memory all engines can open.
    """
    per_engine = config.cluster.rollout_num_gpus_per_engine
    ranks = [[engine * per_engine + rank for rank in range(per_engine)] for engine in range(config.num_engines)]
    return ranks if config.cluster.colocate else [[0] * per_engine for _ in ranks]
