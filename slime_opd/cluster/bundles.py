"""Bundles of GPUs that are reserved on one node: one for the trainer ranks of a node, one for each engine. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Bundles:
    """The GPUs of a run as bundles, each of which Ray reserves on one node: first the trainers', then the engines'.

    The ranks of a node are consecutive, and Megatron numbers tensor-parallel ranks first, so tensor-parallel groups
    stay on a node. A colocated engine has no bundle of its own: engine i is in the bundle of rank i × gpus_per_engine.
    """

    nodes: int
    ranks_per_node: int
    engines: int
    gpus_per_engine: int
    is_colocated: bool

    @property
    def gpus(self) -> list[int]:
        """GPUs of each bundle."""
        own = [] if self.is_colocated else [self.gpus_per_engine] * self.engines
        return [self.ranks_per_node] * self.nodes + own

    def bundle_of_rank(self, rank: int) -> int:
        """Index of the bundle of a trainer rank."""
        return rank // self.ranks_per_node

    def bundle_of_engine(self, engine: int) -> int:
        """Index of the bundle of an engine."""
        return self.bundle_of_rank(engine * self.gpus_per_engine) if self.is_colocated else self.nodes + engine

    def problem(self, gpus_of_nodes: Mapping[str, int]) -> str | None:
        """The reason why a cluster can never hold the bundles, given the GPUs of each node; None if it can."""
        total, largest = sum(gpus_of_nodes.values()), max(gpus_of_nodes.values(), default=0)
        if sum(self.gpus) > total:
            return (
                f"{self._needs()}, the Ray cluster has {total} ({_listed(gpus_of_nodes)}); "
                "change --actor-num-nodes, --actor-num-gpus-per-node or --rollout-num-gpus"
            )
        no_node = f"no node of the Ray cluster has so many GPUs ({_listed(gpus_of_nodes)})"
        if self.nodes and self.ranks_per_node > largest:
            return f"--actor-num-gpus-per-node {self.ranks_per_node}: {no_node}"
        if max(self.gpus) > largest:
            return f"--rollout-num-gpus-per-engine {self.gpus_per_engine}: {no_node}"
        return None

    def timeout_message(self, free_gpus_of_nodes: Mapping[str, int], timeout_s: float) -> str:
        """The error message for GPUs that did not become free."""
        return (
            f"{self._needs()}, and they did not become free within {timeout_s:g} s: "
            f"free are {_listed(free_gpus_of_nodes)}. The ranks of a node (--actor-num-gpus-per-node), and an engine "
            "(--rollout-num-gpus-per-engine), need their GPUs on one node; free GPUs of the cluster, or lower them"
        )

    def _needs(self) -> str:
        engines = 0 if self.is_colocated else self.engines
        parts = [f"{self.nodes} × {self.ranks_per_node} to train"] if self.nodes else []
        parts += [f"{engines} × {self.gpus_per_engine} to generate"] if engines else []
        return f"the run needs {sum(self.gpus)} GPUs ({', '.join(parts)})"


def in_rank_order(devices: Sequence[tuple[int, str]]) -> list[int]:
    """Indices of the trainer processes in the order of their ranks, given the bundle and the GPU id of each process.

    Numeric GPU ids are sorted as numbers, so that neighbouring ranks have neighbouring GPUs.
    """

    def key(index: int) -> tuple[int, int, int, str]:
        bundle, gpu = devices[index]
        return (bundle, 0, int(gpu), "") if gpu.isdigit() else (bundle, 1, 0, gpu)

    return sorted(range(len(devices)), key=key)


def _listed(gpus_of_nodes: Mapping[str, int]) -> str:
    return ", ".join(f"{gpus} on {name}" for name, gpus in gpus_of_nodes.items()) or "none"
