"""Weight transport by broadcast, in a process group of the trainer's first rank and all engines (NCCL, or gloo)."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from slime_opd.config import Config
from slime_opd.engine.control import EngineControl
from slime_opd.weights.buckets import NamedTensor

GROUP = "slime_opd_weights"


class BroadcastTransport:
    """Broadcasts each tensor of a bucket to all engines, on any node."""

    def __init__(self, config: Config, rank: int, controls: list[EngineControl]) -> None:
        self._controls = controls
        self._per_engine = config.cluster.rollout_num_gpus_per_engine
        self._threads = ThreadPoolExecutor(len(controls))
        self._group = self._join()

    def _join(self) -> dist.ProcessGroup:
        if not torch.cuda.is_available():
            from slime_opd.engine.cpu_launcher import prepare_process

            prepare_process()
        # The engines join with this function, and both sides must use the same store prefixes.
        from sglang.srt.utils import init_custom_process_group

        store = listening_store(address_towards([control.url for control in self._controls]))
        world_size = 1 + self._per_engine * len(self._controls)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        join_requests = [
            self._threads.submit(
                control.init_weights_update_group,
                master_address=store.host,
                master_port=store.port,
                rank_offset=1 + index * self._per_engine,
                world_size=world_size,
                group_name=GROUP,
                backend=backend,
            )
            for index, control in enumerate(self._controls)
        ]
        group = init_custom_process_group(
            backend=backend, store=dist.PrefixStore(GROUP, store), world_size=world_size, rank=0, group_name=GROUP
        )
        for request in join_requests:
            request.result()
        return group

    def send(self, bucket: list[NamedTensor]) -> None:
        """Announce one bucket to every engine, then broadcast its tensors in order; returns when all have them."""
        receive_requests = [
            self._threads.submit(
                control.update_weights_from_distributed,
                names=[name for name, _ in bucket],
                dtypes=[str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
                shapes=[tuple(tensor.shape) for _, tensor in bucket],
                group_name=GROUP,
                flush_cache=False,
            )
            for control in self._controls
        ]
        for _, tensor in bucket:
            dist.broadcast(tensor, src=0, group=self._group)
        for request in receive_requests:
            request.result()

    def finish(self, version: str) -> None:
        """Make the engines drop prefixes cached under the old weights, and set the version."""
        for control in self._controls:
            control.flush_cache()
            control.set_weight_version(version)


def address_towards(urls: list[str]) -> str:
    """The address of this node on the route to the servers at `urls`; loopback where all of them are on this node.

    The node's name would not do: many nodes resolve their own name to a loopback address.
    """
    addresses = []
    for url in urls:
        split = urlsplit(url)
        family, kind, *_, target = socket.getaddrinfo(split.hostname, split.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as route:
            route.connect(target)  # a datagram socket looks up the route and sends nothing
            addresses.append((route.getsockname()[0], target[0]))
    # Servers on this node reach all its addresses; servers elsewhere reach the address of their route.
    return next((own for own, server in addresses if own != server), addresses[0][0])


def listening_store(address: str) -> dist.TCPStore:
    """A store that listens on a free port of `address`, and on no other address of this node."""
    family = socket.getaddrinfo(address, None)[0][0]
    with socket.create_server((address, 0), family=family) as listener:
        port = listener.getsockname()[1]
        # The store takes over the open socket, so that no other process can get the port in between.
        return dist.TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
