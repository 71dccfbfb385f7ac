"""One run per directory: a lock that lives as long as the process that holds it, however that process ends.

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
    """Hold the lock of a directory, which is made if need be; `with` gives a warning where its file system has no locks.

    Raises ConfigError where another process holds it, with that process, and where the directory cannot be written.
    """

    def __init__(self, directory: str | Path, flag: str = "--save") -> None:
        self._directory, self._flag = Path(directory), flag
        self._descriptor: int | None = None

    def __enter__(self) -> str | None:
        path = self._directory / LOCK
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            # Closed in programs that this process starts; `_close_in_child` does so in a fork that starts none.
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

    # A fork shares the open file, and with it the lock, which would then outlive the run. Closing it here leaves the run's own.
    _close_in_child = _close


def _holder(descriptor: int) -> str:
    found = os.pread(descriptor, 500, 0).decode(errors="replace").strip()
    return found or "it has only just started"
