"""Weight transport by shared tensors: the engines open memory of the trainer and copy from it."""

from __future__ import annotations

import datetime
from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist

from slime_opd.config import Config
from slime_opd.config.weight_transport import memory_sources
from slime_opd.engine.control import EngineControl
from slime_opd.weights.buckets import NamedTensor
from slime_opd.weights.shared import LOAD_FORMAT, SharedBucket


class TensorTransport:
    """Shares each bucket with all engines at once.

    Every trainer rank in `memory_sources` has one; calls are collectives of these ranks.

    An engine takes the handles of all its ranks in one request, in rank order. So the handles are gathered, and the
    trainer rank of an engine's first handle posts them.
    """

    def __init__(self, config: Config, rank: int, controls: list[EngineControl]) -> None:
        self._controls, self._rank = controls, rank
        self._sources = memory_sources(config)
        self._threads = ThreadPoolExecutor(len(controls))
        ranks = sorted({source for sources in self._sources for source in sources})
        self._group: dist.ProcessGroup | None = None
        if len(ranks) > 1:
            timeout = datetime.timedelta(minutes=config.training.distributed_timeout_minutes)
            # Handles are objects in host memory, whatever device the weights are on.
            self._group = dist.new_group(ranks, timeout, backend="gloo", use_local_synchronization=True)

    def send(self, bucket: list[NamedTensor]) -> None:
        """Send one bucket to all engines; returns when they have it."""
        shared = SharedBucket(bucket)
        own = [[shared.handle() if source == self._rank else None for source in sources] for sources in self._sources]
        handles = self._from_all_ranks(own)
        requests = [
            self._threads.submit(
                control.update_weights_from_tensor, handles[engine], load_format=LOAD_FORMAT, flush_cache=False
            )
            for engine, control in enumerate(self._controls)
            if self._sources[engine][0] == self._rank
        ]
        for request in requests:
            request.result()
        if self._group is not None:
            # An engine rank whose handles another trainer rank posted has opened this rank's memory too.
            dist.barrier(self._group)
        shared.close()

    def finish(self, version: str) -> None:
        """Make the engines drop prefixes cached under the old weights, and set the version."""
        if self._rank != 0:
            return
        for control in self._controls:
            control.flush_cache()
            control.set_weight_version(version)

    def _from_all_ranks(self, own: list[list[str | None]]) -> list[list[str]]:
        """All handles, by engine and engine rank. `own` has those of this trainer rank, and None for others."""
        per_rank = [own]
        if self._group is not None:
            per_rank *= self._group.size()
            dist.all_gather_object(per_rank, own, group=self._group)
        return [
            [next(filter(None, handles)) for handles in zip(*engine, strict=True)]
            for engine in zip(*per_rank, strict=True)
        ]
