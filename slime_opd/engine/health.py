"""Health of a server: are its processes alive, and does it answer.

An SGLang server is an HTTP process with a scheduler (one per GPU) and a detokenizer as children. The HTTP process
outlives a killed scheduler and still accepts requests, which are never answered. So the children are watched too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx
import psutil

# Prefixes of arguments that identify a server's processes. SGLang's children set their titles
# ("sglang::scheduler_TP0").
_NAMES_BY_PREFIX = {
    "sglang.launch_server": "HTTP process",
    "slime_opd.engine.cpu_launcher": "HTTP process",
    "sglang::": None,  # the rest of the argument is the name
}


@dataclass(frozen=True)
class Worker:
    """One process of a server. `started`: its creation time, which differs from that of a later process with its id."""

    name: str
    pid: int
    started: float


def server_workers(pid: int) -> list[Worker]:
    """The processes that a server needs, among `pid` and its descendants; [] if `pid` has ended."""
    workers: list[Worker] = []
    try:
        server = psutil.Process(pid)
        processes = [server, *server.children(recursive=True)]
    except psutil.NoSuchProcess:
        return workers
    argvs: dict[int, list[str]] = {}
    for process in processes:
        try:
            argvs[process.pid] = argv = process.cmdline()
            name = worker_name(argv)
            # A fork that has not set its title, or not executed its program yet, shows its parent's argv: it is not a
            # worker, and a scheduler's short-lived children end by themselves.
            if name is not None and argv != argvs.get(process.ppid()):
                workers.append(Worker(name, process.pid, process.create_time()))
        except psutil.NoSuchProcess:  # it ended meanwhile
            continue
    return workers


def worker_name(argv: Sequence[str]) -> str | None:
    """The name of the server process with this command line; None for a process that the server does not need."""
    for argument in argv:
        for prefix, name in _NAMES_BY_PREFIX.items():
            if argument.startswith(prefix):
                return name or argument.removeprefix(prefix).split()[0]
    return None


def process_status(pid: int, started: float | None = None) -> str:
    """The status "running", "stopped" (by a signal) or "dead" (ended, a zombie, or its id now belongs to another)."""
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


def worst_status(
    workers: Sequence[Worker], get_status: Callable[[int, float], str] = process_status
) -> tuple[str, str]:
    """The worst status of the workers, and the names of those that have it; ("running", "") if all run."""
    statuses = [(get_status(worker.pid, worker.started), worker) for worker in workers]
    for worst in ("dead", "stopped"):
        names = [f"{worker.name}, process {worker.pid}" for status, worker in statuses if status == worst]
        if names:
            return worst, "; ".join(names)
    return "running", ""


def answers(url: str, timeout_s: float, transport: httpx.BaseTransport | None = None) -> bool:
    """Whether the server at `url` answers within `timeout_s` seconds. SGLang's /health is 503 if it cannot generate."""
    with httpx.Client(trust_env=False, timeout=timeout_s, transport=transport) as http:
        try:
            # Any status below 500 counts: a server of another kind may not have the path.
            return http.get(f"{url.rstrip('/')}/health").status_code < 500
        except httpx.HTTPError:
            return False
