"""Which of several equal servers a request goes to: the one whose cache holds the beginning of its prompt.

Prompts that begin alike prefer the same server (rendezvous hashing of their first tokens), unless it has much more to
do than the others: then the next in their order (consistent hashing with bounded loads, arXiv 1608.01350). All
branches of a request have its seat; where a server fails, the whole request moves.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from itertools import chain

from langchain_earlyexit.engines.wire import Fault, Server

_PREFIX = 256
"""Tokens that prompts must share to be thought alike: system prompts and tools are longer than chats' formalities."""

_SLACK = 1.25
"""How much more than its share of requests a server may have before others are preferred."""


class Fleet:
    """Servers of one model.

    Args:
        servers: at least one.
    """

    def __init__(self, servers: Sequence[Server]) -> None:
        self.servers = tuple(servers)

    def seat(self, ids: Sequence[int]) -> Seat:
        """A place for a request with this prompt.

        Raises:
            ConnectionError: every server has failed again and again, and is left alone for now.
        """
        order = sorted(self.servers, key=lambda server: _score(server.url, ids), reverse=True)
        usable = [server for server in order if not server.circuit.rest]
        if not usable:
            first = min(server.circuit.rest for server in order)
            names = ", ".join(server.url for server in order)
            raise ConnectionError(
                f"{names}: failed {order[0].circuit.failed} times in a row; not asked again for {first:.1f} s"
            )
        most = math.ceil(_SLACK * (1 + sum(server.load for server in usable)) / len(usable))
        chosen = next((server for server in usable if server.load < most), usable[0])
        return Seat(chosen, order)


class Seat:
    """Where one request's branches are drawn. To be left when it is over.

    Attributes:
        server: the one it has now.
    """

    def __init__(self, server: Server, order: Sequence[Server]) -> None:
        self._order = order
        self._failed: set[Server] = set()  # since a token of theirs, or since nobody was left to ask
        self.server = server
        server.load += 1

    def move(self, failed: Server, fault: Fault) -> None:
        """After a fault of `failed`: to another server, if there is one that may be asked."""
        if self.server is not failed:  # another branch of the request has already moved it
            fault.moved = True
            return
        self._failed.add(failed)
        at = self._order.index(failed)
        others = [one for one in chain(self._order[at + 1 :], self._order[:at]) if one not in self._failed]
        usable = [one for one in others if not one.circuit.rest]
        found = min(usable, key=lambda one: one.circuit.failed, default=None)  # the first of those that failed least
        if found is None:
            self._failed.clear()
        else:
            self._sit(found)
            fault.moved = True

    def worked(self, server: Server) -> None:
        """A token has come from `server`."""
        self._failed.discard(server)

    def leave(self) -> None:
        self.server.load -= 1

    def _sit(self, server: Server) -> None:
        self.server.load -= 1
        self.server = server
        server.load += 1


def _score(url: str, ids: Sequence[int]) -> bytes:
    prefix = ",".join(map(str, ids[:_PREFIX]))
    return hashlib.blake2b(f"{url} {prefix}".encode(), digest_size=8).digest()
