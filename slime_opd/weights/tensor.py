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
        self._ranks = config.cluster.rollout_num_gpus_per_engine
        self._buffer = SharedBuffer()
        self._threads = ThreadPoolExecutor(len(controls))

    def send(self, bucket: list[NamedTensor]) -> None:
        """Send one bucket to all engines; each of their ranks opens the same memory."""
        handles = self._buffer.serialize(bucket, self._ranks * len(self._controls))
        sending = [
            self._threads.submit(
                control.update_weights_from_tensor,
                handles[index * self._ranks : (index + 1) * self._ranks],
                flush_cache=False,
            )
            for index, control in enumerate(self._controls)
        ]
        for one in sending:
            one.result()

    def finish(self, version: str) -> None:
        """Drop prefixes cached under the old weights, and name the new ones."""
        for control in self._controls:
            control.flush_cache()
            control.set_weight_version(version)
