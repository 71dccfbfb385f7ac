"""Weights from tensors: the engines open the trainer's memory and copy from it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from slime_opd.config import Config
from slime_opd.engine.control import EngineControl
from slime_opd.weights.buckets import NamedTensor
from slime_opd.weights.shared import SharedBuffer


class TensorTransport:
    """Shares each bucket with all engines at once. They must be on the sender's machine (with CUDA: see its GPU)."""

    def __init__(self, config: Config, controls: list[EngineControl]) -> None:
        self._controls = controls
        self._copies = config.cluster.rollout_num_gpus_per_engine
        self._buffer = SharedBuffer()
        self._threads = ThreadPoolExecutor(len(controls))

    def send(self, bucket: list[NamedTensor]) -> None:
        """Send one bucket; each of an engine's ranks opens the same memory."""
        serialized = [self._buffer.serialize(bucket)] * self._copies
        list(
            self._threads.map(
                lambda control: control.update_weights_from_tensor(serialized, flush_cache=False), self._controls
            )
        )

    def finish(self, version: str) -> None:
        """Drop prefixes cached under the old weights, and name the new ones."""
        for control in self._controls:
            control.flush_cache()
            control.set_weight_version(version)
