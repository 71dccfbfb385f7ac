"""The processes and the shared memory of a run, identified by a mark in their environment.

All processes of a run inherit the environment of its driver: Ray's own, its workers, the servers and their children. So
they are found even if their parents have died, and next to other runs on the same machine. Linux only: reads /proc.
This is independent of slime_opd.lifetimes, which it tests.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from drill.kinds import Role

MARK = "FAULT_DRILL_RUN"

_SHARED_MEMORY = Path("/dev/shm")
# Patterns of a process's title or command line; the first match counts.
_ROLES = (
    (r"slime_opd\.lifetimes\.warden import main", Role.WARDEN),
    (r"gcs_server", Role.GCS),
    (r"raylet/raylet ", Role.RAYLET),
    (r"ray::(DashboardAgent|RuntimeEnvAgent)", Role.AGENT),
    (r"ray::EngineActor", Role.ENGINE_ACTOR),
    (r"ray::TrainerActor", Role.TRAINER),
    (r"ray::|/ray/", Role.RAY),
    (r"slime_opd\.engine\.cpu_launcher", Role.LAUNCHER),
    (r"sglang::scheduler", Role.SCHEDULER),
    (r"sglang::detokenizer", Role.DETOKENIZER),
    (r"sglang::router|-m (slime_opd\.engine\.with_key )?sglang_router", Role.ROUTER),
    (r"math_worker\.py", Role.REWARD),
)


@dataclass(frozen=True)
class Process:
    """A process. `started` (clock ticks since boot) distinguishes it from a later process with the same id."""

    pid: int
    parent: int
    started: int
    command: str
    role: Role

    def __str__(self) -> str:
        command = f" ({self.command[-80:]})" if self.role in (Role.OTHER, Role.RAY) else ""
        return f"{self.role.value} {self.pid}{command}"

    def is_alive(self) -> bool:
        """Whether it still runs and is not a zombie."""
        with contextlib.suppress(OSError):
            state, _, started = _stat(self.pid)
            return started == self.started and state not in "ZX"
        return False

    def send(self, number: signal.Signals) -> None:
        """Send it a signal, if it has not ended."""
        if self.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def marked(mark: str, driver: int | None = None) -> list[Process]:
    """The living processes with the mark in their environment. `driver`: process id of the run's driver."""
    needle = f"{MARK}={mark}\0".encode()
    processes = []
    for entry in os.listdir("/proc"):
        # A process may end meanwhile; processes of other users are not readable, and not the run's.
        with contextlib.suppress(OSError):
            if entry.isdigit() and needle in Path(f"/proc/{entry}/environ").read_bytes() + b"\0":
                processes.append(_describe(int(entry), driver))
    return processes


def descendants(pid: int) -> list[Process]:
    """The living descendants of a process, with or without the mark."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if entry.isdigit():
                children.setdefault(_stat(int(entry))[1], []).append(int(entry))
    processes, queue = [], [pid]
    while queue:
        for child in children.get(queue.pop(), []):
            queue.append(child)
            with contextlib.suppress(OSError):
                processes.append(_describe(child, None))
    return [process for process in processes if process.is_alive()]


def shared_memory(processes: Iterable[Process]) -> set[Path]:
    """The files in /dev/shm with the id of one of these processes in their name (torch's), or mapped by one of them."""
    processes = list(processes)
    owners = {process.pid for process in processes}
    names = {path for path in _SHARED_MEMORY.iterdir() if owners & {int(part) for part in _numbers(path.name)}}
    for process in processes:
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{process.pid}/maps").read_text(errors="replace")
            names |= {Path(path) for path in re.findall(r"(/dev/shm/\S+)$", maps, re.MULTILINE)}
    return {path for path in names if path.exists()}


def role_of(command: str) -> Role:
    """The role of the process with this title or command line; OTHER if it matches no pattern."""
    return next((role for pattern, role in _ROLES if re.search(pattern, command)), Role.OTHER)


def _numbers(name: str) -> list[str]:
    """The numbers in a name like torch_4711_123456_0, up to the size of a process id."""
    return [part for part in re.findall(r"\d+", name) if len(part) <= 7]


def _describe(pid: int, driver: int | None) -> Process:
    _, parent, started = _stat(pid)
    command = _command(pid)
    if pid == driver:
        return Process(pid, parent, started, command, Role.DRIVER)
    return Process(pid, parent, started, command, Role.OTHER if _is_fork(command, parent) else role_of(command))


def _is_fork(command: str, parent: int) -> bool:
    """Whether a process shows its parent's command: a fork that has not set its title yet."""
    with contextlib.suppress(OSError):
        return _command(parent) == command
    return False


def _command(pid: int) -> str:
    """The title or command line of a process. Raises OSError if it does not exist."""
    argv = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0 ").split(b"\0")
    return b" ".join(argv).decode(errors="replace")


def _stat(pid: int) -> tuple[str, int, int]:
    """State, parent's id and start time of a process. Raises OSError if it does not exist."""
    # The name, in parentheses, may itself contain spaces and parentheses.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[1]), int(fields[19])
