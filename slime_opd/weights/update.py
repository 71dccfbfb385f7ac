"""Bringing the engines to the trainer's weights: gather, cut into buckets, send, and prove that they arrived.

All trainer ranks gather each weight together; the first rank sends. How it travels is a WeightTransport.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from slime_opd.config import Config
from slime_opd.engine.control import EngineControl
from slime_opd.errors import ConfigError, WeightSyncError
from slime_opd.weights.broadcast import BroadcastTransport
from slime_opd.weights.buckets import NamedTensor, buckets
from slime_opd.weights.disk import DiskTransport
from slime_opd.weights.shared import SharedBuffer
from slime_opd.weights.tensor import TensorTransport


class WeightTransport(Protocol):
    """One way for weights to reach the engines."""

    def send(self, bucket: list[NamedTensor]) -> None:
        """Send one bucket; when it returns the tensors may be overwritten."""

    def finish(self, version: str) -> None:
        """Make the engines serve what was sent, as weights `version`."""


TRANSPORTS: dict[str, Callable[[Config, list[EngineControl]], WeightTransport]] = {
    "tensor": TensorTransport,
    "broadcast": BroadcastTransport,
    "disk": DiskTransport,
}


class WeightSender:
    """Sends weights to the engines at `urls`, whose API key is `key`; on ranks that do not send, `urls` is empty."""

    def __init__(self, config: Config, urls: list[str], key: str | None = None) -> None:
        self._limit = config.weights.update_weight_buffer_size
        self._controls = [EngineControl(url, api_key=key) for url in urls]
        make = TRANSPORTS[transport_of(config)]
        self._transport = make(config, self._controls) if urls else None
        self._ranks = config.cluster.rollout_num_gpus_per_engine
        self._proof_buffer = SharedBuffer()

    def send(self, weights: Callable[[], Iterator[NamedTensor]], version: int, *, check: bool) -> None:
        """Update every engine to `weights()`, which all ranks iterate together.

        With `check`, raises WeightSyncError where an engine then serves anything else.
        """
        for bucket in buckets(weights(), self._limit):
            if self._transport is not None:
                self._transport.send(bucket)
        if self._transport is not None:
            self._transport.finish(str(version))
        if check:
            self._check(weights)

    def _check(self, weights: Callable[[], Iterator[NamedTensor]]) -> None:
        differing: dict[str, list[str]] = {}
        for bucket in buckets(weights(), self._limit):
            for control in self._controls:
                handles = self._proof_buffer.serialize(bucket, self._ranks)
                differing.setdefault(control.url, []).extend(control.differing_weights(handles))
        for url, names in differing.items():
            if names:
                raise WeightSyncError(
                    f"the engine at {url} did not serve the trainer's weights: {len(names)} parameters differ, first {', '.join(names[:3])}"
                )


def transport_of(config: Config) -> str:
    """The transport of a run. An engine on GPUs of its own cannot open the memory of a trainer's GPU.

    Raises ConfigError where "tensor" is asked for and cannot work.
    """
    asked = config.weights.update_weight_transport
    shares_memory = config.cluster.colocate if torch.cuda.is_available() else config.cluster.actor_num_nodes == 1
    if asked == "auto":
        return "tensor" if shares_memory else "broadcast"
    if asked == "tensor" and not shares_memory:
        raise ConfigError(
            "--update-weight-transport tensor: the engines have GPUs of their own and cannot open the trainer's memory; say broadcast, or --colocate"
        )
    return asked
