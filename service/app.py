"""The one place that constructs things: settings in, an ASGI application out.

The outermost layer gives every request its id and its log line, sends the calls that carry tensors to the data plane
and all others to the control plane, and turns what nobody expected into a 500 that tells nothing of the inside.
"""

import asyncio
import random
import re
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import structlog
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from core.evaluate import Evaluator, Spec
from service import __version__, schemas
from service.access.gate import Gate, KeysNeeded
from service.access.hosts import listens_locally, parse_hosts
from service.access.keys import KnownKeys
from service.access.quotas import Quotas
from service.access.usage import Quota
from service.acks import AckImpossible, Asked
from service.admission import TICKET, Admission, Limits, Ticket
from service.control import create_control
from service.data import DataPlane
from service.embedded import Embedded
from service.engine import Engine
from service.errors import Overloaded, ServiceError, StoreUnavailable
from service.failpoints import Failpoints
from service.http import Receive, Scope, Send, send_reply
from service.logs import AccessLog, request_id
from service.meters import CompileMeters, RequestMeters, Route
from service.metrics import Metrics
from service.operations import OPERATIONS, PAGES
from service.problem_table import PROBLEMS
from service.problems import HTTPError, refused_as
from service.recycling import blocks
from service.replies import refusal
from service.settings import Settings
from service.short_way import ShortWay
from service.store import Store
from service.tracing import Tracing
from service.valkey import EmbeddedFailed
from service.workers.berth import Berth
from service.workers.scrape import Scrape

log = structlog.get_logger("ravine")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
# How long a store that is not there yet is waited for at the start.
STORE_SECONDS = 30


class App:
    """An ASGI application. `drain` ends what would otherwise wait for ever: long-polls and event streams."""

    def __init__(self, settings: Settings, berth: Berth | None = None) -> None:
        self.settings = settings
        self._berth = berth
        self._worker = None if berth is None else berth.number
        self.exit_code = 1  # of a start that failed
        self.admission = Admission(_limits(settings))
        self.admission.told = self._turned_away
        self._access = AccessLog(settings.log_format, worker=self._worker)
        self._embedded: Embedded | None = None
        if not settings.redis_url:
            self._embedded = Embedded(settings.data, settings.embedded_durability, on_progress=_tell)
        self._keepers: list[asyncio.Task[None]] = []  # of the embedded store, and of memory
        self._lifespan_task: asyncio.Task[None] | None = None
        self._store: Store | None = None
        self._engine: Engine | None = None
        self._data: DataPlane | None = None
        self._gate: Gate | None = None
        self._quotas: Quotas | None = None
        self._control: Any = None
        self._scrape: Scrape | None = None  # of all workers
        self.handovers: Mapping[str, int] = {}  # between them, by what became of the connection
        routes = [(each.method, each.path) for each in OPERATIONS] + [("GET", page) for page in PAGES]
        self._requests = RequestMeters([Route(*route) for route in routes], PROBLEMS)
        self._compilations = CompileMeters()
        self._tracing: Tracing | None = None
        self._short: ShortWay | None = None
        self._handle: Callable[[Scope, Receive, Send], Awaitable[None]] = self._request
        self._told_to_stop = False
        self._failpoints = Failpoints(settings.failpoints)
        self._failing = self._failpoints.armed("before-reply")
        if settings.failpoints:
            log.warning("failpoints are set: this service breaks off where it is told to", at=settings.failpoints)

    @property
    def store_place(self) -> str:
        """Where the sessions are kept, in words, without secrets."""
        return self.settings.store_place

    async def start(self) -> None:
        """Raises EmbeddedFailed, StoreUnavailable, AckImpossible."""
        if self._embedded is not None:
            await self._embedded.start()
            self._keepers = [asyncio.create_task(each()) for each in (self._embedded.watch, self._embedded.flush)]
        blocks.most = self.settings.max_bodies // 4
        self._keepers.append(asyncio.create_task(blocks.keep_tidy()))
        url = self.settings.redis_url or (self._embedded.url if self._embedded else "")
        asked = Asked(self.settings.ack, self.settings.ack_replicas)
        self._store = Store(url, failpoints=self._failpoints, asked=asked)
        await self._open(self._store)
        evaluator = Evaluator(self._compile if self.settings.jit else None, blocks.empty)
        budget, max_state = self.settings.memory, self.settings.max_state
        quota = Quota(self.settings.max_sessions, self.settings.max_tenant_state)
        self._engine = Engine(self._store, evaluator, schemas.document_of, budget, max_state, quota, schemas.brief_of)
        await self._engine.start()
        self._gate = await self._guarded(self._store, self._engine)
        self._quotas = Quotas(self._store.link.call, self.settings.rate, self.settings.max_tenant_requests)
        self._data = DataPlane(self._engine, self.settings.max_body)
        if self.settings.tracing:
            self._tracing = Tracing(self._requests.template, __version__)
            self._engine.trace(self._tracing)
            self._handle = self._tracing.traced(self._request)
        elif not self._failing:  # both look into each message of a reply
            self._short = self._way(self._gate, self._quotas, self._engine)
        metrics = self._metrics(self._store, self._engine)
        if self._berth is not None:
            self._scrape = Scrape(self._berth, metrics.text)
            await self._scrape.open()
        self._control = create_control(
            self._engine, max_body=self.settings.max_body, version=__version__, metrics=self._scrape or metrics
        )

    def _way(self, gate: Gate, quotas: Quotas, engine: Engine) -> ShortWay:
        limit, meters = self.settings.max_body, self._requests
        return ShortWay(self.admission, gate, quotas, engine, meters, self._access, limit=limit, named=_request_id)

    def takes(self, cycle: RequestResponseCycle) -> bool:
        """Whether a request is dealt with right away, without a call of this application."""
        return self._short is not None and self._short.take(cycle)

    def _metrics(self, store: Store, engine: Engine) -> Metrics:
        kind = "redis" if self.settings.redis_url else "embedded"
        about = {"version": __version__, "store": kind, "ack": self.settings.ack}
        metrics = Metrics(self._requests, store.meters, self._compilations, store.index.count, about, self._worker)
        metrics.gauge("ravine_sessions_hot", "Sessions in the memory of this process.", lambda: engine.hot[0])
        metrics.gauge("ravine_sessions_hot_bytes", "Bytes that these take, estimated.", lambda: engine.hot[1])
        metrics.gauge("ravine_sessions_hot_bytes_limit", "What they may take.", lambda: self.settings.memory)
        let_in = self.admission
        metrics.gauge("ravine_http_connections", "Connections of clients.", lambda: let_in.connections)
        metrics.gauge("ravine_http_requests_in_flight", "Requests at work, not waiting.", lambda: let_in.requests)
        metrics.gauge("ravine_http_requests_limit", "How many of these may be at work now.", lambda: let_in.limit)
        metrics.gauge("ravine_http_arrivals", "Requests whose bodies are waited for.", lambda: let_in.arrivals)
        metrics.gauge("ravine_http_waits", "Long polls, event streams and waits for a round.", lambda: let_in.waits)
        metrics.gauge("ravine_http_body_bytes", "Bytes of bodies held for requests.", lambda: let_in.bodies)
        metrics.counter("ravine_overloaded", "Refused, by what there was too much of.", "of", lambda: let_in.refused)
        metrics.counter("ravine_connections_cut", "Connections that were cut, by why.", "reason", lambda: let_in.cut)
        if (short := self._short) is not None:
            metrics.counter("ravine_http_ways", "Steps and pulls, by their way.", "way", lambda: short.counts)
        if self._berth is not None:
            metrics.counter("ravine_handovers", "Connections, between workers.", "became", lambda: self.handovers)
        return metrics

    async def _guarded(self, store: Store, engine: Engine) -> Gate:
        """Raises KeysNeeded where nobody could come in, or anybody."""
        settings = self.settings
        local = await asyncio.to_thread(listens_locally, settings.host)
        if local or settings.insecure:
            if settings.keys == "required" and await _keyless(store):
                log.warning("there is no valid key yet, so everybody is refused: ravine keys create makes one")
            elif not local and settings.keys != "required":
                names = settings.hosts or "any name"
                log.warning("no keys are asked for: whoever reaches it has every session", host=settings.host, by=names)
        else:
            if settings.keys == "off":
                raise KeysNeeded(f"without keys it listens on {settings.host} only if --insecure is said, too")
            if await _keyless(store):
                raise KeysNeeded(
                    f"there is no valid key for those who reach {settings.host}: make one with "
                    f"`ravine keys create --scope admin`, or say --insecure to let everybody in"
                )
        known = KnownKeys(store.keyring)
        return Gate(
            known,
            engine.tenant,
            engine.tidy,
            keys=settings.keys,
            local=local,
            insecure=settings.insecure,
            hosts=None if settings.hosts is None else parse_hosts(settings.hosts),
            docs=settings.docs,
        )

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
            seconds = time.monotonic() - started
            self._compilations.end(seconds)
            log.info("compiled", rule=name, dtype=spec.dtype, seconds=round(seconds, 2))

        self._compilations.begin()
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
        if self._scrape is not None:
            await self._scrape.close()
        if self._gate is not None:
            await self._gate.stop()
        if self._engine is not None:
            await self._engine.stop()
        for keeper in self._keepers:  # or they would start the store again that is about to be stopped
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        if self._store is not None:
            await self._store.close()
        if self._embedded is not None:
            await self._embedded.stop()
        if self._tracing is not None:
            await self._tracing.close()
        self._access.flush()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._handle(scope, receive, send)
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
            self.exit_code = 2 if isinstance(error, KeysNeeded) else 1
            if not isinstance(error, StoreUnavailable | OSError | EmbeddedFailed | KeysNeeded | AckImpossible):
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
        ticket: Ticket | None = None

        async def send_with_id(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                if self._failing:
                    await self._failpoints.reach("before-reply")
                status = message["status"]
                if status >= 400:
                    self._requests.refuse(refused_as.get())
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", id_.encode())]
            await send(message)

        try:
            ticket = scope.get(TICKET) or self.admission.enter(scope)  # the short way may have let it in
            await self._answer(scope, receive, send_with_id)
        except Overloaded as error:
            if status == 0:
                await send_reply(send_with_id, refusal(error, scope["path"]), head=scope["method"] == "HEAD")
        except Exception as error:
            log.exception("unexpected failure", path=scope["path"])
            if status == 0:
                await send_reply(send_with_id, refusal(error, scope["path"]))
        finally:
            if ticket is not None:
                ticket.leave()
            seconds = time.perf_counter() - started
            self._requests.end(scope["method"], scope["path"], status, seconds)
            self._access.write(scope["method"], scope["path"], status, seconds, id_)

    def _turned_away(self, scope: Scope) -> bytes:
        """By the protocol, for there is too much to do: counted, and in the log. Gives the id that is told with it."""
        id_ = _request_id(scope)
        self._requests.refuse("overloaded")
        self._requests.end(scope["method"], scope["path"], 503, 0.0)
        self._access.write(scope["method"], scope["path"], 503, 0.0, id_)
        return id_.encode()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Past the gate, to the plane whose call it is."""
        assert self._gate is not None
        assert self._quotas is not None
        assert self._data is not None
        try:
            access = scope["ravine.access"] = await self._gate.caller(scope)
            turn = await self._quotas.enter(access, scope)
            try:
                send = send if turn is None else turn.told(send)
                await self._gate.check(access, scope)
                plane = self._data if self._data.matches(scope) else self._control
                if access.key is None:
                    await plane(scope, receive, send)
                else:
                    await self._gate.watched(plane, access.key, scope, receive, send)
            finally:
                if turn is not None:
                    turn.leave()
        except (ServiceError, HTTPError) as error:  # the gate's: what the planes refuse they tell by themselves
            await send_reply(send, refusal(error, scope["path"]), head=scope["method"] == "HEAD")


def _limits(settings: Settings) -> Limits:
    return Limits(
        settings.max_connections,
        settings.max_requests,
        settings.max_waits,
        max(settings.max_bodies, 2 * settings.max_body),  # one at its largest, as sent and as inflated
        settings.header_seconds,
        settings.stall_seconds,
        settings.lag_seconds,
    )


async def _keyless(store: Store) -> bool:
    """Whether there is no key that lets anybody in."""
    return all(key.expired for key in await store.keyring.all())


def _tell(sentence: str) -> None:
    log.info(sentence)


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            given: str = value.decode()
            return given
    return f"{random.getrandbits(64):016x}"  # to tell lines apart, not to be kept secret


def create_app(settings: Settings | None = None, berth: Berth | None = None) -> App:
    """The application for `settings`, which are read from the environment if left out; `berth`: as one of several."""
    return App(Settings() if settings is None else settings, berth)
