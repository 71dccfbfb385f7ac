"""Scopes of processes: no process outlives the one that started it.

A process that starts others (the driver of a run, each of its Ray actors) calls `own`. From then on everything it
starts carries its scope in the environment variable SLIME_OPD_RUN. A small process, the warden (warden.py), waits for
the owner's end and then kills what is left of the scope. A scope is a path: "4f1c" is a run on the driver's machine,
"4f1c/engine-0" one of its actors with its SGLang server. A warden kills its own scope and all scopes below it: the
driver's covers the whole run on its machine, an actor's covers what the actor started, on whichever node Ray put it.

Why the warden survives what kills its owner:
- it learns of the owner's end from a pipe whose only writing end the owner holds. The kernel closes the pipe however
  the owner ends: SIGKILL, the out-of-memory killer, a crash in native code;
- it has a session of its own, so a closed terminal, Ctrl-C and a signal to the owner's process group do not reach it.
  It is not a child of the owner (it forks twice), because a dying Ray worker kills its children;
- it imports only the standard library and starts before any other process.
It finds processes by their environment, not by their parent or group: an orphan, or a process with a session of its
own, is found too. The usual alternative, the kernel's parent-death signal, has to be set by each program itself, and
ends a server as soon as the *thread* that started it ends.

A process that forks without exec shows the environment with which its parent was started, and a driver's scope is not
in that. So an owner also maps an empty file named after the scope; a fork inherits the mapping.

Each owner has a private temporary directory, the TMPDIR of what it starts, which its warden removes with the sockets
and other files in it. Shared memory (torch's tensors, semaphores of Python's multiprocessing) is unlinked if the killed
processes had mapped it and no living process has.
"""

from __future__ import annotations

import atexit
import contextlib
import getpass
import mmap
import os
import re
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

from slime_opd.lifetimes import processes

RUN_VARIABLE = "SLIME_OPD_RUN"
# The line that an owner writes to its warden when it exits by itself.
NORMAL_EXIT = b"."
# In the command line of every warden.
WARDEN_IMPORT = "from slime_opd.lifetimes.warden import main"
# Directories that outlive a run or are read by other programs stay at their defaults: Ray's sessions, which hold the
# address of a running cluster, and torch's compiled kernels.
SHARED_DIRECTORIES = ("RAY_TMPDIR", "TORCHINDUCTOR_CACHE_DIR")

# A socket's path has at most 107 bytes; the longest that is made in a temporary directory, by wandb, adds some 40.
_LONGEST_DIRECTORY = 65
_PACKAGE_ROOT = Path(__file__).parents[2]


class _Owner:
    """What this process holds as the owner of a scope."""

    def __init__(self) -> None:
        self.pid = 0
        self.pipe = -1
        self.scope_mapping: mmap.mmap | None = None


_owner = _Owner()


def own(scope: str | None = None) -> str:
    """Make this process the owner of a scope and start its warden; returns the scope.

    `scope` is the scope that this process was started in, with `scope_environment`. None makes a new scope, below that
    of the process that started this one, if it has one. A second call returns the same scope.
    """
    if _owner.pid == os.getpid():
        return os.environ[RUN_VARIABLE]
    parent = os.environ.get(RUN_VARIABLE)
    if scope is None:
        scope = "/".join(filter(None, [parent, secrets.token_hex(4)]))
    os.environ.update(scope_environment(scope))
    _owner.scope_mapping = _map_scope(scope)
    reading, _owner.pipe = os.pipe()
    directory = _make_private_directory(scope)
    # -I -S: no site packages and no environment variables, so that nothing can hide the standard library.
    program = f"import sys; sys.path.append({str(_PACKAGE_ROOT)!r}); {WARDEN_IMPORT}; main()"
    command = [sys.executable, "-I", "-S", "-c", program, scope, str(os.getpid()), directory]
    subprocess.run(command, stdin=reading, stdout=subprocess.DEVNULL, start_new_session=True, cwd="/", check=True)
    os.close(reading)
    _owner.pid = os.getpid()
    os.environ["TMPDIR"] = tempfile.tempdir = directory
    # A fork without exec would hold the pipe open after the owner's death.
    os.register_at_fork(after_in_child=_close_pipe_in_fork)
    atexit.register(_report_normal_exit)
    return scope


def leave_last_words(text: str) -> None:
    """Set the line that this process's warden prints if the process dies without an error of its own."""
    if _owner.pid == os.getpid():
        with contextlib.suppress(OSError):  # the warden was killed
            os.write(_owner.pipe, " ".join(text.split()).encode() + b"\n")


def scope_environment(scope: str) -> dict[str, str]:
    """The environment variables of a process in `scope`.

    SPT_NOENV keeps setproctitle, which SGLang and Ray's agents call, from overwriting the environment in /proc.
    """
    return {RUN_VARIABLE: scope, "SPT_NOENV": "1"}


def processes_in_scope(scope: str | None) -> list[int]:
    """Ids of a scope's living processes on this machine (a run's: all of it), wardens included; [] for None."""
    if scope is None:
        return []
    return [pid for pid in processes.all_pids() if _is_in_scope(pid, scope) and processes.is_alive(pid)]


def scope_of_process(pid: int) -> str | None:
    """The scope that a process owns (a run's driver: the run's), or else was started in; None if it has none."""
    return _owned_scope(pid) or _inherited_scope(pid)


def is_within(inner: str | None, scope: str) -> bool:
    """Whether `inner` is `scope` or a scope below it."""
    return inner is not None and (inner == scope or inner.startswith(scope + "/"))


def _map_scope(scope: str) -> mmap.mmap:
    """Map a file in memory that is named after the scope."""
    descriptor = os.memfd_create(f"{RUN_VARIABLE}={scope}=")
    os.ftruncate(descriptor, mmap.PAGESIZE)
    mapping = mmap.mmap(descriptor, mmap.PAGESIZE)
    os.close(descriptor)
    return mapping


def _make_private_directory(scope: str) -> str:
    """Make the owner's temporary directory: below the current one, or below /tmp if socket paths would be too long."""
    shared = tempfile.gettempdir()
    defaults = (shared, os.path.join(shared, f"torchinductor_{_user_name()}"))
    for name, path in zip(SHARED_DIRECTORIES, defaults, strict=True):
        os.environ.setdefault(name, path)
    prefix = f"slime_opd_{scope.rpartition('/')[2]}_"
    parent = shared if len(shared) + len(prefix) < _LONGEST_DIRECTORY - 10 else "/tmp"
    return tempfile.mkdtemp(prefix=prefix, dir=parent)


def _user_name() -> str:
    """The user's name as torch writes it in the name of its cache."""
    try:
        return re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
    except (KeyError, OSError):  # no entry for this user, as in some containers
        return f"uid_{os.getuid()}"


def _close_pipe_in_fork() -> None:
    if _owner.pipe >= 0:
        os.close(_owner.pipe)
        _owner.pipe = -1


def _report_normal_exit() -> None:
    if _owner.pid == os.getpid():
        with contextlib.suppress(OSError):  # the warden was killed
            os.write(_owner.pipe, NORMAL_EXIT + b"\n")


def _is_in_scope(pid: int, scope: str) -> bool:
    # A driver that was started within another scope has that scope in its environment, and its own in the mapping.
    return is_within(_inherited_scope(pid), scope) or is_within(_owned_scope(pid), scope)


def _inherited_scope(pid: int) -> str | None:
    """The scope in the environment that a process was started with; None if that may not be read."""
    return processes.search_file(f"/proc/{pid}/environ", rf"(?:^|\0){RUN_VARIABLE}=([^\0]*)")


def _owned_scope(pid: int) -> str | None:
    """The scope in the name of the file that an owner and its forks map."""
    return processes.search_file(f"/proc/{pid}/maps", rf"/memfd:{RUN_VARIABLE}=([^=\n]*)=")
