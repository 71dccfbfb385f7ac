"""Run a command with a controlling terminal: `python terminal.py /dev/pts/N COMMAND…`, in a new session.

A session leader that opens a terminal gets it as its controlling terminal: the kernel sends it SIGHUP when the other
end is closed.
"""

import os
import sys

if __name__ == "__main__":
    terminal = os.open(sys.argv[1], os.O_RDWR)
    for stream in range(3):
        os.dup2(terminal, stream)
    os.execv(sys.argv[2], sys.argv[2:])
