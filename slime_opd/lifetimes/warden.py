"""The warden: a small process that waits for the end of a scope's owner, then kills what is left of the scope.

Standard library only, in a bare interpreter: it starts fast and stays small. See slime_opd/lifetimes/__init__.py.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time

from slime_opd.lifetimes import NORMAL_EXIT, WARDEN_IMPORT, processes, processes_in_scope

_TRACKER_GRACE_S = 2.0
_WARDEN_GRACE_S = 5.0  # longer than a warden waits for a resource tracker
_TIMEOUT_S = 30.0


def main() -> None:
    """Wait for the end of standard input, whose other end the owner holds; then end the owner's scope.

    Arguments: the scope, the owner's process id, and the owner's private temporary directory, which is removed.
    """
    scope, owner, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    if os.fork():
        os._exit(0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    received = b""
    while part := os.read(0, 4096):
        # Only the last complete line is needed, and the beginning of the next.
        received = b"\n".join((received + part).split(b"\n")[-2:])
    killed = end_scope(scope, owner)
    shutil.rmtree(directory, ignore_errors=True)
    message = received.partition(b"\n")[0]
    # Only a driver sets a message; it reports the deaths of its actors itself.
    if message in (b"", NORMAL_EXIT):
        return
    report = (
        f"slime_opd: error: process {owner} died without an error of its own: it was killed, or Ray ended it when a "
        f"part of Ray was; {message.decode()}\n"
    )
    if killed:
        report += f"slime_opd: process {owner} died; ended what it had started: {', '.join(killed)}\n"
    with contextlib.suppress(OSError):  # the terminal may be closed
        os.write(2, report.encode())


def end_scope(scope: str, owner: int) -> list[str]:
    """Kill the processes of a scope except this one, and remove their shared memory; returns "PID NAME" of each.

    The resource trackers of Python's multiprocessing unlink semaphores and exit once the processes that use them have
    exited; wardens of nested scopes remove their temporary directories. Both are killed only after a grace period.
    """
    started, killed = time.monotonic(), {}
    pids, inodes = {owner}, set()
    while left := [pid for pid in processes_in_scope(scope) if pid != os.getpid()]:
        waited = time.monotonic() - started
        if waited > _TIMEOUT_S:
            break
        # Of all processes before the first is killed: others may exit with it.
        inodes |= processes.mapped_shared_memory(left)
        for pid in left:
            name = processes.command_line(pid)
            is_tracker, is_warden = "multiprocessing.resource_tracker" in name, WARDEN_IMPORT in name
            if waited < (_WARDEN_GRACE_S if is_warden else _TRACKER_GRACE_S if is_tracker else 0):
                continue
            if not is_warden and not is_tracker:
                killed[pid] = f"{pid} {name[:60]}"
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            pids.add(pid)
        time.sleep(processes.POLL_S)
    # The names of torch's segments hold the process id, so they are found even if the process had not mapped them.
    for pid in pids:
        with contextlib.suppress(OSError):  # removed meanwhile
            inodes |= {file.stat().st_ino for file in processes.SHARED_MEMORY.glob(f"torch_{pid}_*")}
    processes.remove_shared_memory(inodes)
    return list(killed.values())
