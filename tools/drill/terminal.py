"""Takes a terminal for its own and becomes a command: `python terminal.py /dev/pts/N COMMAND…`, in a new session.

The leader of a session that opens a terminal controls it from then on: the kernel sends it SIGHUP when the other end is closed.
"""

import os
import sys

if __name__ == "__main__":
    terminal = os.open(sys.argv[1], os.O_RDWR)
    for stream in range(3):
        os.dup2(terminal, stream)
    os.execv(sys.argv[2], sys.argv[2:])
