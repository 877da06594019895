"""Whose session a request is for, and the protocol that hands a connection over to where that session is at home.

It is looked at where a message begins, and only while nothing of the connection is anywhere else: no request under way
or waiting, nothing that is yet to be sent. What the parser would make of the bytes does not matter, for the home parses
them again: whether a path is one of a session decides where it is served, never how. So a head whose first part ends
before the id, an id in other characters, or one that is pipelined behind another, is served where it came.

The home is a hash of the id by the number of workers. That number never changes while they run, and nothing is hot when
they start, so nothing is won by a consistent one; a proxy that spreads sessions over machines has need of that.
"""

import asyncio
import re
import socket
from collections.abc import Callable
from typing import Any, ClassVar, Final

import structlog
import xxhash

from service.admission import Admission
from service.outlet import PlainOutlet
from service.protocol import BETWEEN, Guarded, Takes
from service.workers.berth import Berth
from service.workers.links import Landing, Link

log = structlog.get_logger("ravine.workers")

_SESSION: Final = re.compile(rb"[A-Z]{3,7} /v1/sessions/(ses_[0-9a-z]{20,60})[/? ]")


def session_in(data: bytes) -> bytes | None:
    """The id of the session that the request names which begins `data`, if that can be told."""
    found = _SESSION.match(data)
    return None if found is None else found[1]


def home_of(session: bytes, workers: int) -> int:
    """The number of the worker that keeps it hot."""
    return xxhash.xxh3_64_intdigest(session) % workers


class Handovers:
    """Connections that leave this worker, and that arrive.

    `counts` tells how many, how many were kept, and how many came back, since nobody had taken them.
    """

    def __init__(self, berth: Berth) -> None:
        self._berth = berth
        self._links = {number: Link(berth.connections(number), self._take_back) for number in berth.others}
        self._landing: Landing | None = None
        self._arriving: set[asyncio.Task[None]] = set()
        self._protocol: Callable[[], asyncio.Protocol] | None = None
        self.counts = dict.fromkeys(("given", "kept", "returned", "taken"), 0)

    async def open(self, protocol: Callable[[], asyncio.Protocol]) -> None:
        """From now on connections arrive, each of which gets a `protocol` (a Guarded)."""
        self._protocol = protocol
        self._landing = Landing(self._berth.connections(self._berth.number), self._take)

    async def close(self) -> None:
        """Those that are on their way have arrived when this returns, or come back, and no more do."""
        if self._landing is not None:
            self._landing.close()
        for link in self._links.values():
            link.close()
        while self._arriving:
            await asyncio.wait(self._arriving)

    def elsewhere(self, data: bytes) -> Link | None:
        """The way to the home of the session that `data` begins to ask for, if that is another worker."""
        session = session_in(data)
        if session is None:
            return None
        home = home_of(session, self._berth.workers)
        return None if home == self._berth.number else self._links[home]

    def _take(self, connection: socket.socket, data: bytes) -> None:
        self.counts["taken"] += 1
        self._serve(connection, data)

    def _take_back(self, connection: socket.socket, data: bytes) -> None:
        """The home has died, or hangs. It is not sent there again before that one can be seen to be back."""
        self.counts["returned"] += 1
        self._serve(connection, data)

    def _serve(self, connection: socket.socket, data: bytes) -> None:
        task = asyncio.create_task(self._arrive(connection, data))
        self._arriving.add(task)
        task.add_done_callback(self._arriving.discard)

    async def _arrive(self, connection: socket.socket, data: bytes) -> None:
        connection.setblocking(False)
        try:
            transport, waiting = await asyncio.get_running_loop().connect_accepted_socket(_Waiting, connection)
        except OSError as error:  # the client has gone
            log.debug("a connection was lost while it was handed over", reason=str(error))
            connection.close()
            return
        if waiting.over:
            return
        assert self._protocol is not None
        protocol = self._protocol()
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        protocol.data_received(data + waiting.come)


class _Waiting(asyncio.Protocol):
    """Of a connection whose first bytes are elsewhere: what comes meanwhile comes after them."""

    def __init__(self) -> None:
        self.come = b""
        self.over = False

    def data_received(self, data: bytes) -> None:
        self.come += data

    def connection_lost(self, _: Exception | None) -> None:
        self.over = True


class Routed(Guarded):
    """One connection of a worker that has others beside it. `handovers` is set by `routed`."""

    handovers: ClassVar[Handovers]

    def data_received(self, data: bytes) -> None:
        if self._at == BETWEEN and not self._busy and self._leaves(data):
            return
        super().data_received(data)

    def _leaves(self, data: bytes) -> bool:
        """Whether it has gone to where its session is at home."""
        link = self.handovers.elsewhere(data)
        outlet = self._outlet
        if link is None or not isinstance(outlet, PlainOutlet):
            return False
        if outlet.deaf or outlet.ending or outlet.is_closing() or self.pipeline:
            return False
        if outlet.unsent or not link.send(outlet.get_extra_info("socket").fileno(), data):
            self.handovers.counts["kept"] += 1
            return False
        self.handovers.counts["given"] += 1
        outlet.let_go()
        return True


def routed(admission: Admission, handovers: Handovers, takes: Takes) -> type[Guarded]:
    """The protocol for a uvicorn.Config, as protocol.guarded gives it, that routes by `handovers`."""
    members: dict[str, Any] = {"admission": admission, "handovers": handovers, "takes": staticmethod(takes)}
    return type("Routed", (Routed,), members)
