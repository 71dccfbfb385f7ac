"""Which GPUs are reserved together: one bundle for the trainer ranks of a node, one for each engine. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Bundles:
    """The GPUs of a run as bundles, each of which Ray reserves on one node: first the trainers', then the engines'.

    Ranks of a node are consecutive: Megatron numbers tensor-parallel ranks first, so that their group stays on a node.
    A colocated engine has no bundle of its own: engine i stands where ranks i × gpus_per_engine and following stand.
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
        """Index of the bundle that an engine stands in."""
        return self.bundle_of_rank(engine * self.gpus_per_engine) if self.is_colocated else self.nodes + engine

    def problem(self, gpus_of_nodes: Mapping[str, int]) -> str | None:
        """Why a cluster whose nodes have so many GPUs can never hold the bundles; None where it may."""
        total, largest = sum(gpus_of_nodes.values()), max(gpus_of_nodes.values(), default=0)
        if sum(self.gpus) > total:
            return f"{self._needs()}, the Ray cluster has {total} ({_listed(gpus_of_nodes)}); change --actor-num-nodes, --actor-num-gpus-per-node or --rollout-num-gpus"
        if self.nodes and self.ranks_per_node > largest:
            return f"--actor-num-gpus-per-node {self.ranks_per_node}: no node of the Ray cluster has so many GPUs ({_listed(gpus_of_nodes)})"
        if max(self.gpus) > largest:
            return f"--rollout-num-gpus-per-engine {self.gpus_per_engine}: no node of the Ray cluster has so many GPUs ({_listed(gpus_of_nodes)})"
        return None

    def timeout_message(self, free_gpus_of_nodes: Mapping[str, int], timeout_s: float) -> str:
        """The sentence for GPUs that did not become free."""
        return (
            f"{self._needs()}, and they did not become free within {timeout_s:g} s: free are {_listed(free_gpus_of_nodes)}. "
            "The ranks of a node (--actor-num-gpus-per-node), and an engine (--rollout-num-gpus-per-engine), need their GPUs on one node; "
            "end what else uses the cluster, or lower them"
        )

    def _needs(self) -> str:
        engines = 0 if self.is_colocated else self.engines
        parts = [f"{self.nodes} × {self.ranks_per_node} to train"] if self.nodes else []
        parts += [f"{engines} × {self.gpus_per_engine} to generate"] if engines else []
        return f"the run needs {sum(self.gpus)} GPUs ({', '.join(parts)})"


def in_rank_order(places: Sequence[tuple[int, str]]) -> list[int]:
    """The order of trainer processes by rank, given the bundle and the id of the GPU of each: which index is rank 0, 1, …

    By number where ids are numbers, so that neighbouring ranks have neighbouring GPUs.
    """
    key = lambda place: (place[0], (0, int(place[1]), "") if place[1].isdigit() else (1, 0, place[1]))  # noqa: E731
    return sorted(range(len(places)), key=lambda index: key(places[index]))


def _listed(gpus_of_nodes: Mapping[str, int]) -> str:
    return ", ".join(f"{gpus} on {name}" for name, gpus in gpus_of_nodes.items()) or "none"
