"""A free TCP port. `python -m slime_opd.engine.ports` prints one."""

from __future__ import annotations

import random
import socket

# Below the range that Linux gives to outgoing connections, one of which could take the port before the server does.
_SERVER_PORTS = range(20000, 32768)


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port of `host` that is free now; of all addresses of this node with "". Raises OSError if none is free."""
    for port in random.sample(_SERVER_PORTS, len(_SERVER_PORTS)):
        with socket.socket() as listener:
            try:
                listener.bind((host, port))
            except OSError:
                continue
            return port
    raise OSError(
        f"found no free port of {host or 'this node'}, "
        f"expected one from {_SERVER_PORTS.start} to {_SERVER_PORTS.stop - 1}"
    )


if __name__ == "__main__":
    print(free_port(""))
