"""Nothing outlives its owner: the scope of a process, and the warden that ends what is left in it.

A process that starts others (the driver of a run, each of its Ray actors) calls `own`. From then
on everything it starts carries its scope in the environment variable SLIME_OPD_RUN, and a small
process, the warden, waits for it to end and then kills what the scope still holds. A scope is a
path: "4f1c" is a run on the driver's machine, "4f1c/engine-0" one actor of it with its SGLang
server. A warden kills its own scope and all below it, so the driver's covers the whole run on
its machine, and an actor's covers what the actor started, wherever Ray put it.

Why it survives what kills its owner:
- it learns of the owner's end from a pipe whose only writing end the owner holds. The kernel closes
  it however the owner ends: SIGKILL, the out-of-memory killer, a crash in native code;
- it is in a session of its own, so a closed terminal, Ctrl-C and a signal to the owner's process group do not
  reach it, and it is no child of the owner (it forks twice), because a dying Ray worker kills its children;
- it imports the standard library alone and starts before anything else does.
What it kills need not be its descendant or in any group: a process that was orphaned, or that
made a session of its own, still has its environment. The parent-death signal of the kernel, the usual
alternative, would have to be set by each program itself, and ends a server when the mere *thread* that started it ends.

A process that forks without exec shows the environment of its parent's start, which a driver's scope is not in:
the driver also maps an empty file named after the scope, and a fork inherits the mapping.

Files go with the processes. Each owner has a private temporary directory, TMPDIR of what it starts, which its warden
removes: sockets and media directories of killed processes end up nowhere else. Shared memory (torch's tensors, the semaphores of
Python's multiprocessing) is unlinked where the killed processes had mapped it and no living process has.
"""

from __future__ import annotations

import atexit
import contextlib
import getpass
import mmap
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

RUN_VARIABLE = "SLIME_OPD_RUN"

_ORDERLY = b"."  # the line that an owner writes to its warden when it ends by itself
_TRACKER_GRACE_S = 2.0
_WARDEN_GRACE_S = 5.0  # longer than a warden waits for a tracker
# A socket's path has at most 107 bytes; the longest that is made in a temporary directory, wandb's, adds some 40.
_LONGEST_DIRECTORY = 65
_SHARED_MEMORY = Path("/dev/shm")
# Variables of directories that outlive a run or are read by other programs, which therefore stay where they are by default:
# Ray's sessions and the address of a running cluster, and torch's compiled kernels.
SHARED_DIRECTORIES = ("RAY_TMPDIR", "TORCHINDUCTOR_CACHE_DIR")
_PATIENCE_S = 30.0
_POLL_S = 0.05


class _Owner:
    """What this process holds as the owner of a scope."""

    def __init__(self) -> None:
        self.pid = 0
        self.lifeline = -1
        self.mark: mmap.mmap | None = None


_owner = _Owner()


def own(scope: str | None = None) -> str:
    """Make this process the owner of a scope and start its warden; returns the scope.

    `scope` is the one that it was started in with `environment_of`; None makes a new one, below that of the process
    that started this one where there is any. A second call returns the same scope.
    """
    if _owner.pid == os.getpid():
        return os.environ[RUN_VARIABLE]
    parent = os.environ.get(RUN_VARIABLE)
    if scope is None:
        scope = "/".join(filter(None, [parent, secrets.token_hex(4)]))
    os.environ.update(environment_of(scope))
    _owner.mark = _mark(scope)
    reading, _owner.lifeline = os.pipe()
    directory = _private_directory(scope)
    # -I -S: the standard library alone, which types.py beside this file would hide; it starts fast and stays small.
    command = [sys.executable, "-I", "-S", __file__, scope, str(os.getpid()), directory]
    subprocess.run(command, stdin=reading, stdout=subprocess.DEVNULL, start_new_session=True, cwd="/", check=True)
    os.close(reading)
    _owner.pid = os.getpid()
    os.environ["TMPDIR"] = tempfile.tempdir = directory
    # A fork that is no exec would hold the pipe open after the owner's death.
    os.register_at_fork(after_in_child=_close_in_fork)
    atexit.register(_end_orderly)
    return scope


def leave_last_words(text: str) -> None:
    """Give this process's warden the line to print should the process end without printing anything itself; the latest counts."""
    if _owner.pid == os.getpid():
        with contextlib.suppress(OSError):  # the warden was killed
            os.write(_owner.lifeline, " ".join(text.split()).encode() + b"\n")


def environment_of(scope: str) -> dict[str, str]:
    """The environment variables of a process that belongs to `scope`.

    SPT_NOENV keeps setproctitle, which SGLang and Ray's agents call, from overwriting the environment that we read.
    """
    return {RUN_VARIABLE: scope, "SPT_NOENV": "1"}


def processes_of_run(scope: str) -> list[int]:
    """Ids of the living processes of a run, or of any scope, on this machine, wardens included; zombies are not alive."""
    return [pid for pid in _all_processes() if _belongs(pid, scope) and is_alive(pid)]


def processes_of_group(group: int) -> list[int]:
    """Ids of the living processes of a process group."""
    members = []
    for pid in _all_processes():
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(pid) == group and is_alive(pid):
                members.append(pid)
    return members


def wait_gone(pids: Iterable[int], timeout_s: float = 5.0) -> None:
    """Return when none of the processes, which were sent SIGKILL, lives any more, at the latest after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def scope_of_process(pid: int) -> str | None:
    """The scope that a process owns (of a run's driver: the run), or the one it was started in; None where it has none."""
    return _marked_scope(pid) or _inherited_scope(pid)


def is_within(inner: str | None, scope: str) -> bool:
    """Whether `inner` is `scope` or below it."""
    return inner is not None and (inner == scope or inner.startswith(scope + "/"))


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


def end_scope(scope: str, owner: int) -> list[str]:
    """Kill what `scope` holds, except this process, and remove the shared memory that is left; returns what was killed, "PID NAME".

    The resource trackers of Python's multiprocessing end by themselves once those they serve
    are gone, and unlink their semaphores then; wardens of scopes below remove their temporary directories:
    both are killed only after a grace period.
    """
    started, killed = time.monotonic(), {}
    pids, shared = {owner}, set()
    while left := [pid for pid in processes_of_run(scope) if pid != os.getpid()]:
        waited = time.monotonic() - started
        if waited > _PATIENCE_S:
            break
        # All of them before the first is killed: others may end with it.
        shared |= shared_memory_of(left)
        for pid in left:
            name = _command_of(pid)
            is_tracker, is_warden = "multiprocessing.resource_tracker" in name, __file__ in name
            if waited < (_WARDEN_GRACE_S if is_warden else _TRACKER_GRACE_S if is_tracker else 0):
                continue
            if not is_warden and not is_tracker:
                killed[pid] = f"{pid} {name[:60]}"
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            pids.add(pid)
        time.sleep(_POLL_S)
    # What a process shares with torch carries its id, also where it had not mapped it when it died.
    for pid in pids:
        with contextlib.suppress(OSError):  # gone meanwhile
            shared |= {file.stat().st_ino for file in _SHARED_MEMORY.glob(f"torch_{pid}_*")}
    remove_shared_memory(shared)
    return list(killed.values())


def shared_memory_of(pids: Iterable[int]) -> set[int]:
    """Inodes of the files in /dev/shm that living processes have mapped: tensors, semaphores, segments of NCCL.

    Not their names: a semaphore is made under another one, which is what /proc shows of the process that made it.
    """
    return {inode for pid in pids for inode in _mapped_shared_memory(pid)}


def remove_shared_memory(inodes: set[int]) -> None:
    """Unlink those of the files in /dev/shm with `inodes` that no living process has mapped."""
    with contextlib.suppress(OSError):  # no such directory, or a file that has gone meanwhile
        files = {entry.inode(): entry.path for entry in os.scandir(_SHARED_MEMORY) if entry.inode() in inodes}
        for inode in files.keys() - (shared_memory_of(_all_processes()) if files else set()):
            with contextlib.suppress(OSError):  # another warden was faster, or it is another user's
                os.unlink(files[inode])


def main(scope: str, owner: int, directory: str) -> None:
    """The warden: wait for the end of the owner, who holds the other end of standard input; then end its scope.

    directory: the owner's private temporary directory, which is removed.
    """
    if os.fork():
        os._exit(0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    received = b""
    while part := os.read(0, 4096):
        # The last complete line, and what has come of the next.
        received = b"\n".join((received + part).split(b"\n")[-2:])
    killed = end_scope(scope, owner)
    shutil.rmtree(directory, ignore_errors=True)
    last = received.partition(b"\n")[0]
    # The driver reports its actors' ends, and leaves last words for its own.
    if last in (b"", _ORDERLY):
        return
    message = f"slime_opd: error: process {owner} died without an error of its own: it was killed, or Ray ended it when a part of Ray was; {last.decode()}\n"
    if killed:
        message += f"slime_opd: process {owner} died; ended what it had started: {', '.join(killed)}\n"
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, message.encode())


def _mark(scope: str) -> mmap.mmap:
    descriptor = os.memfd_create(f"{RUN_VARIABLE}={scope}=")
    os.ftruncate(descriptor, mmap.PAGESIZE)
    mark = mmap.mmap(descriptor, mmap.PAGESIZE)
    os.close(descriptor)
    return mark


def _private_directory(scope: str) -> str:
    """Make the temporary directory of a scope's owner, in the present one; in /tmp where paths of sockets would get too long."""
    shared = tempfile.gettempdir()
    for name, path in zip(
        SHARED_DIRECTORIES, (shared, os.path.join(shared, f"torchinductor_{_user_name()}")), strict=True
    ):
        os.environ.setdefault(name, path)
    prefix = f"slime_opd_{scope.rpartition('/')[2]}_"
    parent = shared if len(shared) + len(prefix) < _LONGEST_DIRECTORY - 10 else "/tmp"
    return tempfile.mkdtemp(prefix=prefix, dir=parent)


def _user_name() -> str:
    """As torch has it in the name of its cache."""
    try:
        return re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
    except (KeyError, OSError):  # no entry for this user, as in some containers
        return f"uid_{os.getuid()}"


def _close_in_fork() -> None:
    if _owner.lifeline >= 0:
        os.close(_owner.lifeline)
        _owner.lifeline = -1


def _end_orderly() -> None:
    if _owner.pid == os.getpid():
        with contextlib.suppress(OSError):  # the warden was killed
            os.write(_owner.lifeline, _ORDERLY + b"\n")


def _all_processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _belongs(pid: int, scope: str) -> bool:
    # A driver that was started within another scope has that in its environment and its own in the mark.
    return is_within(_inherited_scope(pid), scope) or is_within(_marked_scope(pid), scope)


def _inherited_scope(pid: int) -> str | None:
    """The scope in the environment that a process was started with; None of a process that may not be read."""
    return _search(f"/proc/{pid}/environ", rf"(?:^|\0){RUN_VARIABLE}=([^\0]*)")


def _marked_scope(pid: int) -> str | None:
    """The scope in the name of the file that an owner maps, as do its forks."""
    return _search(f"/proc/{pid}/maps", rf"/memfd:{RUN_VARIABLE}=([^=\n]*)=")


def _mapped_shared_memory(pid: int) -> list[int]:
    try:
        maps = Path(f"/proc/{pid}/maps").read_bytes()
    except OSError:
        return []
    # ADDRESSES PERMISSIONS OFFSET DEVICE INODE PATH
    return [int(inode) for inode in re.findall(rb"^(?:\S+ ){4}(\d+) +/dev/shm/", maps, re.MULTILINE)]


def _search(file: str, pattern: str) -> str | None:
    try:
        found = re.search(pattern.encode(), Path(file).read_bytes())
    except OSError:
        return None
    return None if found is None else found[1].decode(errors="replace")


def _command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return "?"


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
