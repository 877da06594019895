"""The one place that constructs things: settings in, an ASGI application out.

The outermost layer gives every request its id and its log line, sends the calls that carry tensors to the data plane
and all others to the control plane, and turns what nobody expected into a 500 that tells nothing of the inside.
"""

import asyncio
import re
import secrets
import threading
import time
from typing import Any

import structlog

from core.evaluate import Evaluator, Spec
from service import __version__, schemas
from service.control import create_control
from service.data import DataPlane
from service.embedded import Embedded
from service.engine import Engine
from service.errors import StoreUnavailable
from service.failpoints import Failpoints
from service.http import Receive, Scope, Send, send_reply
from service.logs import AccessLog, request_id
from service.replies import refusal
from service.settings import Settings
from service.store import Store
from service.valkey import EmbeddedFailed

log = structlog.get_logger("ravine")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
# How long a store that is not there yet is waited for at the start.
STORE_SECONDS = 30


class App:
    """An ASGI application. `drain` ends what would otherwise wait for ever: long-polls and event streams."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._access = AccessLog(settings.log_format)
        self._embedded: Embedded | None = None
        if not settings.redis_url:
            self._embedded = Embedded(settings.data, settings.durability, on_progress=_tell)
        self._keepers: list[asyncio.Task[None]] = []  # of the embedded store
        self._lifespan_task: asyncio.Task[None] | None = None
        self._store: Store | None = None
        self._engine: Engine | None = None
        self._data: DataPlane | None = None
        self._control: Any = None
        self._told_to_stop = False
        self._failpoints = Failpoints(settings.failpoints)
        self._failing = self._failpoints.armed("before-reply")
        if settings.failpoints:
            log.warning("failpoints are set: this service breaks off where it is told to", at=settings.failpoints)

    @property
    def store_place(self) -> str:
        """Where the sessions are kept, in words, without secrets."""
        if self.settings.redis_url:
            # a password may stand before the host or in the query
            return re.sub(r"(?<=://)[^@/]*@", "", self.settings.redis_url.partition("?")[0])
        return str(self.settings.data.resolve())

    async def start(self) -> None:
        """Raises EmbeddedFailed, StoreUnavailable."""
        if self._embedded is not None:
            await self._embedded.start()
            self._keepers = [asyncio.create_task(each()) for each in (self._embedded.watch, self._embedded.flush)]
        url = self.settings.redis_url or (self._embedded.url if self._embedded else "")
        self._store = Store(url, failpoints=self._failpoints)
        await self._open(self._store)
        evaluator = Evaluator(self._compile if self.settings.jit else None)
        budget, max_state = self.settings.memory, self.settings.max_state
        self._engine = Engine(self._store, evaluator, schemas.document_of, budget, max_state)
        await self._engine.start()
        self._data = DataPlane(self._engine, self.settings.max_body)
        self._control = create_control(self._engine, max_body=self.settings.max_body, version=__version__)

    async def _open(self, store: Store) -> None:
        for attempt in range(STORE_SECONDS * 2):
            if self._told_to_stop:
                raise StoreUnavailable("told to stop while waiting for the store")
            try:
                await store.open()
            except StoreUnavailable as error:
                if attempt % 10 == 0:
                    log.info("waiting for the store", store=self.store_place, reason=str(error))
                await asyncio.sleep(0.5)
            else:
                return
        raise StoreUnavailable(f"no store answered at {self.store_place} within {STORE_SECONDS} s")

    def _compile(self, spec: Spec) -> None:
        """In a thread of its own: steps go on in NumPy meanwhile."""

        def compile_() -> None:
            started = time.monotonic()
            name = getattr(spec.update, "__name__", "rule")
            log.info("compiling", rule=name, dtype=spec.dtype)
            evaluator.compile(spec)
            log.info("compiled", rule=name, dtype=spec.dtype, seconds=round(time.monotonic() - started, 2))

        assert self._engine is not None
        evaluator = self._engine.evaluator
        threading.Thread(target=compile_, name="compile", daemon=True).start()

    def tell_to_stop(self) -> None:
        """Nothing more is waited for at the start. Safe in a signal handler."""
        self._told_to_stop = True

    def drain(self) -> None:
        if self._data is not None:
            self._data.drain()

    async def stop(self) -> None:
        if self._engine is not None:
            await self._engine.stop()
        for keeper in self._keepers:  # or they would start the store again that is about to be stopped
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        if self._store is not None:
            await self._store.close()
        if self._embedded is not None:
            await self._embedded.stop()
        self._access.flush()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._request(scope, receive, send)
        else:  # a web socket: there are none here
            await send({"type": "websocket.close", "code": 1000})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        # uvicorn keeps no reference to this task and the loop a weak one, so that it could be collected in the middle
        # of the start or the stop, by whatever thread the collector happens to run in; the process then hung.
        self._lifespan_task = asyncio.current_task()
        await receive()
        try:
            await self.start()
        except Exception as error:
            await self.stop()
            if not isinstance(error, StoreUnavailable | OSError | EmbeddedFailed):
                log.exception("the service could not start")
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.stop()
        await send({"type": "lifespan.shutdown.complete"})

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        id_ = _request_id(scope)
        request_id.set(id_)
        status = 0

        async def send_with_id(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                if self._failing:
                    await self._failpoints.reach("before-reply")
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", id_.encode())]
            await send(message)

        try:
            data = self._data
            if data is not None and data.matches(scope):
                await data(scope, receive, send_with_id)
            else:
                await self._control(scope, receive, send_with_id)
        except Exception as error:
            log.exception("unexpected failure", path=scope["path"])
            if status == 0:
                await send_reply(send_with_id, refusal(error, scope["path"]))
        finally:
            seconds = time.perf_counter() - started
            self._access.write(scope["method"], scope["path"], status, seconds, id_)


def _tell(sentence: str) -> None:
    log.info(sentence)


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            given: str = value.decode()
            return given
    return secrets.token_hex(8)


def create_app(settings: Settings | None = None) -> App:
    """The application for `settings`, which are read from the environment if left out."""
    return App(Settings() if settings is None else settings)
