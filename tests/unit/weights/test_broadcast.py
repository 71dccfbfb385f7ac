"""Where the trainer listens for the engines of its broadcast."""

from __future__ import annotations

import socket

import pytest
import torch.distributed as dist

from slime_opd.weights.broadcast import address_towards, listening_store


def test_the_address_is_loopback_where_the_engines_are_and_never_that_of_the_nodes_name(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: pytest.fail("a node's name may stand for any address"))
    assert address_towards(["http://127.0.0.1:30000", "http://127.0.0.1:30001"]) == "127.0.0.1"


def test_the_address_is_that_of_the_route_to_an_engine_on_another_node(monkeypatch):
    class Route(socket.socket):
        """A route of a node with the addresses 10.0.0.1 (its engine's) and 10.1.0.1 (towards other nodes)."""

        def connect(self, target) -> None:
            self.target = target[0]

        def getsockname(self):
            return ("10.0.0.1" if self.target == "10.0.0.1" else "10.1.0.1"), 5

    monkeypatch.setattr(socket, "socket", Route)
    assert address_towards(["http://10.0.0.1:30000"]) == "10.0.0.1"
    assert address_towards(["http://10.0.0.1:30000", "http://10.1.0.2:30000"]) == "10.1.0.1"


def test_the_port_is_bound_from_the_start_and_only_to_its_address():
    store = listening_store("127.0.0.1")
    with pytest.raises(OSError, match="in use"), socket.socket() as other:
        other.bind(("127.0.0.1", store.port))
    client = dist.TCPStore(store.host, store.port, is_master=False)
    client.set("key", "value")
    assert store.get("key") == b"value"
    # Another address of this machine's loopback: a store that listened everywhere would answer there.
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", store.port), timeout=5)
