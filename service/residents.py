"""The sessions in memory: each is loaded once, and those that were longest not in use make room for others."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from functools import partial
from itertools import islice
from typing import Any, Protocol

from service.errors import SessionNotFound, StoreUnavailable
from service.heads import TRIES, Heads
from service.live import Live
from service.loading import Loader
from service.records import Known, Looked
from service.store import Store


class Spawn(Protocol):
    """Starts a task that the engine waits for when it stops."""

    def __call__(self, coroutine: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]": ...


class Residents:
    """They may take `budget` bytes together, with what is remembered of those that left. `leaving` is called of one
    that has to make room, `entered` of one that came in.
    """

    def __init__(
        self,
        store: Store,
        budget: int,
        spawn: Spawn,
        loader: Loader,
        leaving: Callable[[Live], None],
        entered: Callable[[Live], None],
    ) -> None:
        self._store = store
        self._budget = budget
        self._spawn = spawn
        self._loader = loader
        self._leaving = leaving
        self._entered = entered
        self.live: OrderedDict[str, Live] = OrderedDict()
        self.loading: dict[str, asyncio.Task[Live]] = {}
        self.cost = 0
        self._costs: dict[str, int] = {}
        self.heads = Heads(store, self.live)

    async def load(self, id_: str) -> Live:
        """The session, read from the store once, however many ask for it, and whoever of them goes away meanwhile.

        Raises SessionNotFound, StateLost, UnknownFormat, Corrupt, StoreUnavailable.
        """
        loading = self.loading.get(id_)
        if loading is None:
            loading = self.loading[id_] = self._spawn(self._enter(id_))
        return await asyncio.shield(loading)

    async def _enter(self, id_: str) -> Live:
        try:
            live = await self.read(id_, self.heads.known(id_))
        finally:
            del self.loading[id_]
        self.live[id_] = live
        self.heads.drop(id_)  # memory itself says where it stands
        self.account(live)
        self._entered(live)
        return live

    async def read(self, id_: str, known: Known | None) -> Live:
        """The session as the store has it, compared with where it was last `known` to stand."""
        live = await self._loader.load(id_, partial(self._settled, id_, known))
        live.learn(0 if known is None else known.epoch)
        return live

    async def _settled(self, id_: str, known: Known | None) -> Looked:
        for _ in range(TRIES):
            looked = await self._store.reader.look(id_, -1, known)
            if looked is None or looked.elements is None:
                raise SessionNotFound(id_)
            if await self.heads.settle(id_, known, looked):
                return looked
        raise StoreUnavailable("the session changes faster than it can be read")

    def account(self, live: Live) -> None:
        """Counts what `live` takes now, and lets the longest unused sessions go until all fit the budget."""
        if self.live.get(live.id) is not live:
            # It had to make room just before it was given what to do, or was let go.
            self.heads.remember(live)
            return
        cost = live.cost
        self.cost += cost - self._costs.get(live.id, 0)
        self._costs[live.id] = cost
        while self.cost + self.heads.cost > self._budget:
            # The longest unused come first; a few that are at work are passed over.
            oldest = [self.live[id_] for id_ in islice(self.live, 32)]
            chosen = next((other for other in oldest if other is not live and other.idle), None)
            if chosen is None:
                return
            self._leaving(chosen)
            self.forget(chosen)

    def forget(self, live: Live) -> None:
        """Lets it go; where it stood is remembered."""
        if self.live.get(live.id) is live:
            del self.live[live.id]
            self.cost -= self._costs.pop(live.id, 0)
            self.heads.remember(live)
