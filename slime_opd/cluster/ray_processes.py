"""Ray's own processes on this machine, for a run that started its cluster: their status, and a file for their messages.

Ray has no public interface for either. If its internals are not as expected, nothing is watched and nothing redirected.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray

from slime_opd.observe.watch import ProcessView, Status

# The processes without which a run cannot continue: Ray's internal name, and the name for messages.
_REQUIRED = {"gcs_server": "Ray's GCS server", "raylet": "Ray's raylet"}


def look() -> list[ProcessView]:
    """The status of the required processes that this process's Ray started; [] for a cluster that was only joined."""
    node = getattr(ray._private.worker, "_global_node", None)
    started = getattr(node, "all_processes", None) or {}
    return [
        _view(title, info.process)
        for name, title in _REQUIRED.items()
        for info in started.get(name, [])
        if info.process
    ]


def _view(title: str, process: Any) -> ProcessView:
    code = process.poll()
    if code is None:
        return ProcessView(title, Status.ALIVE, f"process {process.pid}")
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return ProcessView(title, Status.DEAD, f"process {process.pid}, {how}")


def write_messages_to(path: Path) -> None:
    """Write what Ray prints about its own processes (state dumps, deaths) to a file instead of the console.

    The output of the run's processes still goes to the console.
    """
    worker = ray._private.worker
    original = getattr(worker, "print_to_stdstream", None)
    if original is None:
        return

    def print_or_write(data: dict[str, Any], *arguments: Any, **options: Any) -> None:
        if data.get("pid") != "raylet":
            original(data, *arguments, **options)
            return
        with path.open("a", encoding="utf-8") as file:
            file.write("\n".join([*data["lines"], ""]))

    worker.print_to_stdstream = print_or_write
