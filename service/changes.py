"""What waits in a session's queue, and what is to become of it."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from core.aggregation.ledger import Ahead, Ledger
from core.contributions import Checked
from core.errors import CoreError
from core.layout import Array
from service.documents import Applied, Document, Precondition, Stamp, StepRequest
from service.errors import ServiceError
from service.live import Done, Live
from service.records import LogItem


@dataclass(slots=True, eq=False)
class Change:
    """Something that waits to be appended and applied."""

    future: "asyncio.Future[Any]"
    if_match: Precondition | None
    size: int = 0
    step: StepRequest | None = None
    encode: Callable[[Applied], Any] | None = None
    params: Mapping[str, Array] | None = None
    change: Callable[[Document], Document] | None = None
    closing: int | None = None  # the round that is over
    puller: str | None = None  # the worker that is given the parameters

    def alone(self, *, rounds: bool) -> bool:
        """Whether it is checked against the state that it meets, with nothing planned before it. A worker's parameters
        are compared with those of the session, which stand still while a round is open.
        """
        return self.step is None or (self.step.contribution.payload == "params" and not rounds)


@dataclass(slots=True, eq=False)
class Look:
    """Something that reads the session at one commit; `acknowledges`: as an answer to something that was sent."""

    future: "asyncio.Future[Any]"
    read: Callable[[Live], Any]
    threaded: bool = False
    acknowledges: bool = False


@dataclass(slots=True)
class Planned:
    """What is to become of a change: an entry to append, or an answer that needs none."""

    change: Change
    item: LogItem | None = None
    checked: Checked | None = None
    document: Document | None = None
    error: CoreError | ServiceError | None = None
    done: Done | None = None  # what is remembered of the key: of this step, or without an item of an earlier one
    rate: float = 0.0
    epsilon: float | None = None
    position: int = 0  # in the round
    closes: bool = False  # the round is over with it
    announce: float | None = None  # when the round is to be looked at, by any replica
    skipped: bool = False


@dataclass(slots=True)
class Cursor:
    """Where the session will stand when the next change of a batch is applied. `parent` is the last commit, `stamp`
    what a client sees; `ledger` knows of the contributions before, and is there once it is needed.
    """

    stamp: Stamp
    parent: str
    keys: dict[str, Done] = field(default_factory=dict)
    ledger: Ledger | None = None

    def ahead(self, live: Live) -> Ahead:
        if self.ledger is None:
            self.ledger = live.session.state.ledger.copy()
        return Ahead(self.stamp.step, self.ledger)


def new_future() -> "asyncio.Future[Any]":
    return asyncio.get_running_loop().create_future()


def resolve(future: "asyncio.Future[Any]", result: object) -> None:
    if not future.done():
        future.set_result(result)


def fail(future: "asyncio.Future[Any]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
