"""Updates the engines to the trainer's weights: gathers, sends in buckets, and checks that they arrived."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from slime_opd.config import Config
from slime_opd.config.weight_transport import memory_sources, weight_transport
from slime_opd.engine import weight_proof
from slime_opd.engine.control import EngineControl
from slime_opd.errors import WeightSyncError
from slime_opd.weights.broadcast import BroadcastTransport
from slime_opd.weights.buckets import NamedTensor, buckets
from slime_opd.weights.disk import DiskTransport
from slime_opd.weights.tensor import TensorTransport


class WeightTransport(Protocol):
    """A transport of weights to the engines."""

    def send(self, bucket: list[NamedTensor]) -> None:
        """Send one bucket; afterwards the tensors may be overwritten."""

    def finish(self, version: str) -> None:
        """Make the engines serve the sent weights, as `version`."""


TRANSPORTS: dict[str, Callable[[Config, int, list[EngineControl]], WeightTransport]] = {
    "tensor": TensorTransport,
    "broadcast": BroadcastTransport,
    "disk": DiskTransport,
}


class WeightSender:
    """Sends weights to the engines at `urls`, whose API key is `key`.

    Every trainer rank has one; calls are collectives of all ranks.

    The first rank sends; with the transport "tensor", other ranks may send too.
    """

    def __init__(self, config: Config, rank: int, urls: list[str], key: str | None = None) -> None:
        self._bucket_bytes = config.weights.update_weight_buffer_size
        self._ranks_per_engine = config.cluster.rollout_num_gpus_per_engine
        self._controls = [EngineControl(url, api_key=key) for url in urls]
        self._is_first = rank == 0
        transport = weight_transport(config, has_gpus=torch.cuda.is_available())
        senders = {source for sources in memory_sources(config) for source in sources} if transport == "tensor" else {0}
        self._transport = TRANSPORTS[transport](config, rank, self._controls) if rank in senders else None

    def send(self, weights: Callable[[], Iterator[NamedTensor]], version: int, *, check: bool) -> None:
        """Update every engine to `weights()`, an iteration that is a collective of all ranks.

        With `check` they are sent a second time; raises WeightSyncError where an engine does not serve exactly these
        weights.
        """
        checksums = self._send_all(weights, version, with_checksums=check)
        if not check:
            return
        if self._is_first:
            for control in self._controls:
                control.begin_weight_proof(checksums, self._ranks_per_engine)
        self._send_all(weights, version)
        if self._is_first:
            for control in self._controls:
                if wrong := control.finish_weight_proof():
                    raise WeightSyncError(_not_served(control.url, wrong))

    def close(self) -> None:
        """Close the connections to the engines."""
        for control in self._controls:
            control.close()

    def _send_all(
        self, weights: Callable[[], Iterator[NamedTensor]], version: int, *, with_checksums: bool = False
    ) -> dict[str, Tensor]:
        """Send all weights; returns their checksums by name, on the first rank and only `with_checksums`."""
        checksums: dict[str, Tensor] = {}
        for bucket in buckets(weights(), self._bucket_bytes):
            if with_checksums and self._is_first:
                checksums |= {name: weight_proof.checksum(tensor) for name, tensor in bucket}
            if self._transport is not None:
                self._transport.send(bucket)
        if self._transport is not None:
            self._transport.finish(str(version))
        return checksums


_WRONG = {
    weight_proof.CHANGED: "parameters changed when the weights were sent again",
    weight_proof.DIFFERENT: "weights arrived with other values",
    weight_proof.MISSING: "weights did not arrive",
}


def _not_served(url: str, wrong: dict[str, list[str]]) -> str:
    problems = [f"{len(names)} {_WRONG[kind]}, first {', '.join(names[:3])}" for kind, names in wrong.items()]
    return f"the engine at {url} does not serve the trainer's weights: {'; '.join(problems)}"
