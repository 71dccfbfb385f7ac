"""What each trainer rank reports while it works: that it runs, and how many micro-batches it has done.

A rank that trains answers no call of Ray's, so a thread of it writes into the key-value store of Ray's GCS, from where the
driver reads. What it wrote last, some 100 bytes per rank, stays there as long as the cluster.
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
# A rank whose last report is older has stopped, or is cut off. Several periods: a busy machine is late now and then.
SILENT_AFTER_S = 6 * PERIOD_S
_NAMESPACE = "slime_opd"


@dataclass(frozen=True)
class Beat:
    """One report. number: of this report; done: micro-batches since the start, of all passes."""

    node: str
    pid: int
    number: int
    done: int


class Heartbeat:
    """Reports for one rank under `key`, from now until its process ends. `done` is called in another thread."""

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
                # Ray's GCS is gone, and with it the run: the driver sees that by itself.
                return
            pause.wait(PERIOD_S)


def latest(key: str) -> Beat | None:
    """The last report under `key`; None before the first."""
    found = _internal_kv_get(key, namespace=_NAMESPACE)
    return None if found is None else Beat(**json.loads(found))
