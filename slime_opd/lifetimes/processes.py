"""Processes of this machine, read from /proc: which are alive, which group they are in, what shared memory they map.

Standard library only: the warden imports this module in a bare interpreter.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
POLL_S = 0.05


def all_pids() -> list[int]:
    """Ids of all processes of this machine, zombies included."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def is_alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


def command_line(pid: int) -> str:
    """The arguments of a process, joined by spaces; "?" if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return "?"


def search_file(path: str, pattern: str) -> str | None:
    """First group of the first match of `pattern` in a file of /proc; None without a match or without read access."""
    try:
        match = re.search(pattern.encode(), Path(path).read_bytes())
    except OSError:
        return None
    return None if match is None else match[1].decode(errors="replace")


def processes_in_group(group: int) -> list[int]:
    """Ids of the living processes of a process group."""
    members = []
    for pid in all_pids():
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(pid) == group and is_alive(pid):
                members.append(pid)
    return members


def exit_code(process: subprocess.Popen[bytes]) -> int | None:
    """Exit code of a child, negative for a signal; None while it runs.

    Unlike `Popen.poll` it leaves the child as a zombie, so that the id of its process group cannot be reused
    before `end_group`.
    """
    if process.returncode is not None:
        return process.returncode
    state = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if state is None:
        return None
    return state.si_status if state.si_code == os.CLD_EXITED else -state.si_status


def end_group(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """End a child that leads a process group, and the whole group: SIGTERM, and SIGKILL after `grace_s` seconds.

    Shared memory that only these processes had mapped is removed. Does nothing if the child was reaped before.
    """
    if process.returncode is not None:
        return
    # A killed Python process does not unlink its semaphores, so they are noted while it still maps them.
    inodes = mapped_shared_memory(processes_in_group(process.pid))
    _signal_group(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while exit_code(process) is None and time.monotonic() < deadline:
        time.sleep(POLL_S)
    members = processes_in_group(process.pid)
    inodes |= mapped_shared_memory(members)
    _signal_group(process.pid, signal.SIGKILL)
    process.wait()
    _wait_for_exit(members)
    remove_shared_memory(inodes)


def mapped_shared_memory(pids: Iterable[int]) -> set[int]:
    """Inodes of the files in /dev/shm that living processes have mapped: tensors, semaphores, segments of NCCL.

    Inodes, not names: /proc shows a semaphore's creator the temporary name under which it was created.
    """
    return {inode for pid in pids for inode in _mapped_inodes(pid)}


def remove_shared_memory(inodes: set[int]) -> None:
    """Unlink the files in /dev/shm with these inodes that no living process has mapped."""
    with contextlib.suppress(OSError):  # no such directory, or a file that was removed meanwhile
        files = {entry.inode(): entry.path for entry in os.scandir(SHARED_MEMORY) if entry.inode() in inodes}
        for inode in files.keys() - (mapped_shared_memory(all_pids()) if files else set()):
            with contextlib.suppress(OSError):  # removed by another warden, or owned by another user
                os.unlink(files[inode])


def _mapped_inodes(pid: int) -> list[int]:
    try:
        maps = Path(f"/proc/{pid}/maps").read_bytes()
    except OSError:
        return []
    # ADDRESSES PERMISSIONS OFFSET DEVICE INODE PATH
    return [int(inode) for inode in re.findall(rb"^(?:\S+ ){4}(\d+) +/dev/shm/", maps, re.MULTILINE)]


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # the group is empty
        os.killpg(group, number)


def _wait_for_exit(pids: Iterable[int], timeout_s: float = 5.0) -> None:
    """Return when all processes, which were sent SIGKILL, have exited, or after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(POLL_S)
