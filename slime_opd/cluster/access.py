"""Who can reach the servers of a run: nobody outside the node, or, across nodes, who has the key."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Access:
    """Where the SGLang servers of a run listen, and the key that every request to them must carry.

    `loopback_only`: on 127.0.0.1; otherwise on the address of their node. `key` is None where none is needed.
    """

    loopback_only: bool
    key: str | None = field(repr=False)

    def host(self, node_address: str) -> str:
        """The address on which a server on the node with `node_address` listens."""
        return "127.0.0.1" if self.loopback_only else node_address


def access_for(nodes: Iterable[str]) -> Access:
    """The access to servers in a cluster of `nodes`, given by their ids: a random key as soon as there is more than one."""
    if len(set(nodes)) <= 1:
        return Access(loopback_only=True, key=None)
    return Access(loopback_only=False, key=secrets.token_urlsafe(32))
