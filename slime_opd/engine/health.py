"""Whether a server's processes live, and whether it answers.

An SGLang server is an HTTP process with a scheduler (one per GPU) and a detokenizer as children. The HTTP process outlives a
scheduler that was killed and goes on accepting requests that nobody will answer, so the children are watched themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx
import psutil

# How the command lines of a server's processes tell them: SGLang's children name themselves ("sglang::scheduler_TP0").
_MARKS = {
    "sglang.launch_server": "HTTP process",
    "slime_opd.engine.cpu_launcher": "HTTP process",
    "sglang::": None,  # what follows is the name
}


@dataclass(frozen=True)
class Worker:
    """A child process of a server. `started`: its creation time, which tells it from a later process with its id."""

    name: str
    pid: int
    started: float


def workers_of(pid: int) -> list[Worker]:
    """The processes that a server cannot do without: `pid` and below it. [] where `pid` itself is gone."""
    found = []
    try:
        server = psutil.Process(pid)
        processes = [server, *server.children(recursive=True)]
    except psutil.NoSuchProcess:
        return found
    for process in processes:
        try:
            name = worker_name(process.cmdline())
            if name is not None:
                found.append(Worker(name, process.pid, process.create_time()))
        except psutil.NoSuchProcess:  # it ended while it was looked at
            continue
    return found


def worker_name(command: Sequence[str]) -> str | None:
    """What a process with this command line is in a server; None where it is none of the processes that matter."""
    for argument in command:
        for mark, name in _MARKS.items():
            if argument.startswith(mark):
                return name or argument.removeprefix(mark).split()[0]
    return None


def process_status(pid: int, started: float | None = None) -> str:
    """The status "running", "stopped" (by a signal) or "dead" (gone, a zombie, or another process that has the id now)."""
    try:
        process = psutil.Process(pid)
        if started is not None and process.create_time() != started:
            return "dead"
        status = process.status()
    except psutil.NoSuchProcess:
        return "dead"
    if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
        return "dead"
    return "stopped" if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP) else "running"


def unhealthy(workers: Sequence[Worker], status_of: Callable[[int, float], str] = process_status) -> tuple[str, str]:
    """The worst status of the workers, and which have it: ("running", "") where all run."""
    statuses = [(status_of(worker.pid, worker.started), worker) for worker in workers]
    for status in ("dead", "stopped"):
        having = [f"{worker.name}, process {worker.pid}" for found, worker in statuses if found == status]
        if having:
            return status, "; ".join(having)
    return "running", ""


def answers(url: str, timeout_s: float, transport: httpx.BaseTransport | None = None) -> bool:
    """Whether the server at `url` answers within `timeout_s` seconds. SGLang's /health is 503 where it cannot generate."""
    with httpx.Client(trust_env=False, timeout=timeout_s, transport=transport) as http:
        try:
            # Another server may not know the path, and answers all the same.
            return http.get(f"{url.rstrip('/')}/health").status_code < 500
        except httpx.HTTPError:
            return False
