"""Access to the servers of a run: on loopback on one node; with an API key across nodes."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Access:
    """The addresses on which the SGLang servers of a run listen, and the API key of every request to them.

    `loopback_only`: they listen on 127.0.0.1, else on the address of their node. `key`: None without an API key.
    """

    loopback_only: bool
    key: str | None = field(repr=False)

    def host(self, node_address: str) -> str:
        """The address on which a server on the node with `node_address` listens."""
        return "127.0.0.1" if self.loopback_only else node_address


def access_for(nodes: Iterable[str]) -> Access:
    """Access for a cluster with these node ids: loopback for one node, a random key for several."""
    if len(set(nodes)) <= 1:
        return Access(loopback_only=True, key=None)
    return Access(loopback_only=False, key=secrets.token_urlsafe(32))
