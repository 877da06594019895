"""When a connection is read: not while requests wait for their turn behind the one that runs."""

import asyncio
from collections import deque
from typing import Any, Protocol

from uvicorn.protocols.http.flow_control import FlowControl


class Heard(Protocol):
    """Whose flow it is: the requests that wait, and whether more are to be read all the same."""

    pipeline: deque[Any]

    def listens(self, pipeline: Any) -> bool: ...


class Flow(FlowControl):
    """Nothing more is read while requests wait for their turn.

    Unless the one that runs waits itself, and not much was sent behind it: a client that goes is noticed by reading.
    """

    def __init__(self, transport: asyncio.Transport, protocol: Heard) -> None:
        super().__init__(transport)
        self._protocol = protocol

    def pause_reading(self) -> None:
        if not self._protocol.listens(self._protocol.pipeline):
            super().pause_reading()

    def resume_reading(self) -> None:
        if self.read_paused:
            pipeline = self._protocol.pipeline
            if not pipeline or self._protocol.listens(pipeline):
                super().resume_reading()
