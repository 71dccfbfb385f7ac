"""The lock that allows one run per directory. It ends with its process, however that process ends.

The lock is the kernel's (flock), not the file's presence: a file that a dead run left behind locks nothing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from types import TracebackType

from slime_opd.errors import ConfigError

LOCK = "run.lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunLock:
    """Context manager that holds the lock of a directory, and makes the directory if needed.

    Entering returns a warning where the file system has no locks, else None. It raises ConfigError where the directory
    cannot be written, or another process, named in the message, holds the lock.
    """

    def __init__(self, directory: str | Path, flag: str = "--save") -> None:
        self._directory, self._flag = Path(directory), flag
        self._descriptor: int | None = None

    def __enter__(self) -> str | None:
        path = self._directory / LOCK
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            # O_CLOEXEC closes it in programs that this process starts, `_close_in_child` in plain forks.
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(
                f"{self._flag} {self._directory} cannot be written ({error.strerror}); give a directory that this user may write to"
            ) from error
        os.register_at_fork(after_in_child=self._close_in_child)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(self._descriptor)
            self._close()
            raise ConfigError(
                f"{self._flag} {self._directory} is in use by another run ({holder}); wait until it has ended, or give another directory"
            ) from None
        except OSError as error:
            self._close()
            if error.errno not in _UNSUPPORTED:
                raise
            return f"{self._flag} {self._directory}: its file system has no locks ({error.strerror}), so a second run in it would not be noticed"
        os.ftruncate(self._descriptor, 0)
        started = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}, started {started}\n".encode(), 0)
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    # A fork shares the open file and so the lock, which would then outlive the run. Closing it in the fork keeps the
    # run's own lock.
    _close_in_child = _close


def _holder(descriptor: int) -> str:
    text = os.pread(descriptor, 500, 0).decode(errors="replace").strip()
    return text or "it has only just started"
