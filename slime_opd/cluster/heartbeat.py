"""Heartbeats of trainer ranks: that a rank runs, and its number of finished micro-batches.

A rank that trains cannot answer Ray calls, so one of its threads writes to the key-value store of Ray's GCS, which the
driver reads. The last heartbeat, about 100 bytes per rank, stays there as long as the cluster.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass

import ray
from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

PERIOD_S = 5.0
# A rank whose last heartbeat is older counts as silent. Several periods, because threads of a busy machine are late.
SILENT_AFTER_S = 6 * PERIOD_S
_NAMESPACE = "slime_opd"


@dataclass(frozen=True)
class Beat:
    """One heartbeat. `number` counts heartbeats; `done`: micro-batches since the start, over all passes."""

    node: str
    pid: int
    number: int
    done: int


class Heartbeat:
    """Writes heartbeats of one rank under `key` until its process ends. `done` is called in another thread."""

    def __init__(self, key: str, done: Callable[[], int]) -> None:
        self._key, self._done = key, done
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def _run(self) -> None:
        node, number, pause = ray.util.get_node_ip_address(), 0, threading.Event()
        while True:
            number += 1
            beat = Beat(node, os.getpid(), number, self._done())
            try:
                _internal_kv_put(self._key, json.dumps(asdict(beat)), namespace=_NAMESPACE)
            except RayError:
                # Ray's GCS has died, and the run with it; the driver detects that itself.
                return
            pause.wait(PERIOD_S)


def latest(key: str) -> Beat | None:
    """The last heartbeat under `key`; None before the first."""
    content = _internal_kv_get(key, namespace=_NAMESPACE)
    return None if content is None else Beat(**json.loads(content))
