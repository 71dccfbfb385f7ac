"""Runs a command until it ends or its owner dies: `python guard.py OWNER_PID COMMAND…`.

It leads the process group of the command. A guard is a process of its own, and not a
`prctl` in the command, because the kernel's parent-death signal is about the *thread*
that started a process: a thread that ends would take the server with it.
"""

import os
import signal
import subprocess
import sys

_POLL_S = 0.5


def main(owner: int, command: list[str]) -> int:
    """Exit code of the command; when the owner dies first, the whole process group is killed."""
    # The group is sent SIGTERM as one: the guard must outlive the command to see how it ends.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    process = subprocess.Popen(command)
    while os.getppid() == owner:
        try:
            code = process.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            continue
        return code if code >= 0 else 128 - code
    os.killpg(0, signal.SIGKILL)
    return 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
