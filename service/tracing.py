"""Traces by OpenTelemetry, where they are asked for: what a request spent its time on.

    POST /v1/sessions/{session}/steps    the request, under the `traceparent` that came with it
    ├── append                           the batch that its change was committed in goes to the store
    ├── apply                            its change is applied
    └── encode                           its reply is written, within the time of apply

A batch has the changes of many requests. Its `append` stands under the first of them that is sampled, and links to the
others, whose own traces therefore show a gap there. Spans go to a collector by OTLP over HTTP, in batches, by a thread
of OpenTelemetry; its usual variables (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, …) say
where to, as what, and how many. Nothing of OpenTelemetry is imported before a Tracing is made, which takes 0.1 s: where
there are no traces, a step pays for four comparisons.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import structlog

from service.logs import without_secrets
from service.meters import METHODS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, MutableMapping, Sequence

    from opentelemetry.context import Context
    from opentelemetry.trace import Span

    Message = MutableMapping[str, Any]
    Application = Callable[[Any, Any, Any], Awaitable[None]]

T = TypeVar("T")
A = TypeVar("A")

log = structlog.get_logger("ravine.tracing")

# How long the last spans may take to be sent when the service stops.
LAST_SPANS = 2.0


def available() -> bool:
    """Whether the packages are installed; they are not imported."""
    try:
        names = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http")
        return all(importlib.util.find_spec(name) is not None for name in names)
    except ImportError:  # of the packages that these are in
        return False


class _Told(logging.Handler):
    """What OpenTelemetry has to say goes where all log lines go, and says nothing of each attempt."""

    def emit(self, record: logging.LogRecord) -> None:
        log.warning("traces are lost", reason=record.getMessage())


class Tracing:
    """`route` gives the template of a path. Raises ImportError where the extra `tracing` is not installed."""

    def __init__(self, route: Callable[[str], str], version: str) -> None:
        from opentelemetry import context, propagate, trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        logging.getLogger("opentelemetry").addHandler(_Told(logging.ERROR))
        self._route = route
        self._api = trace
        self._extract = propagate.extract
        self._current = context.get_current
        resource = Resource.create()
        named = not str(resource.attributes["service.name"]).startswith("unknown_service")  # in the environment
        ours = {"service.version": version} if named else {"service.version": version, "service.name": "ravine"}
        # A provider of our own: the global one belongs to whoever embeds this application.
        self._provider = TracerProvider(resource=resource.merge(Resource(ours)), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("ravine", version)
        self._asked: WeakKeyDictionary[asyncio.Future[Any], Context] = WeakKeyDictionary()

    async def close(self) -> None:
        """Sends what is left, if the collector takes it in time."""
        # OpenTelemetry tries for ten seconds where nobody answers. The thread is given up with the process.
        last = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        last.start()
        deadline = time.monotonic() + LAST_SPANS
        while last.is_alive() and time.monotonic() < deadline:  # noqa: ASYNC110 - a thread sets no event
            await asyncio.sleep(0.02)

    # Requests

    def traced(self, application: Application) -> Application:
        """The ASGI application, each of whose requests has a span."""

        async def request(scope: Any, receive: Any, send: Any) -> None:
            carried = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            method = scope["method"] if scope["method"] in METHODS else "_OTHER"
            route = self._route(scope["path"])
            path = without_secrets(scope["path"])
            attributes: dict[str, str] = {"http.request.method": method, "http.route": route, "url.path": path}
            with self._tracer.start_as_current_span(
                f"{method} {route}", self._extract(carried), self._api.SpanKind.SERVER, attributes
            ) as span:

                async def noted(message: Message) -> None:
                    if message["type"] == "http.response.start":
                        self._note(span, message)
                    await send(message)

                await application(scope, receive, noted)

        return request

    def _note(self, span: Span, message: Message) -> None:
        span.set_attribute("http.response.status_code", message["status"])
        if message["status"] >= 500:
            span.set_status(self._api.StatusCode.ERROR)
        for name, value in message["headers"]:
            if name == b"x-request-id":
                span.set_attribute("ravine.request_id", value.decode("latin-1"))

    # What becomes of a change

    def asked(self, future: asyncio.Future[Any]) -> None:
        """The request that runs now waits for `future`."""
        self._asked[future] = self._current()

    async def during(
        self, name: str, session: str, futures: Sequence[asyncio.Future[Any]], work: Coroutine[Any, Any, T]
    ) -> T:
        """`work` in a span under the first sampled request that waits for one of `futures`, if there is one."""
        parents = [parent for future in futures if (parent := self._asked.get(future)) is not None]
        spans = [(self._api.get_current_span(parent).get_span_context(), parent) for parent in parents]
        sampled = [(span, parent) for span, parent in spans if span.trace_flags.sampled]
        if not sampled:
            return await work
        attributes: dict[str, str | int] = {"ravine.session": session, "ravine.changes": len(futures)}
        others = [self._api.Link(span) for span, _ in sampled[1:]]
        with self._tracer.start_as_current_span(name, sampled[0][1], attributes=attributes, links=others):
            return await work

    def call(self, name: str, future: asyncio.Future[Any], function: Callable[[A], T], argument: A) -> T:
        """The same of a plain function."""
        with self._tracer.start_as_current_span(name, self._asked.get(future)):
            return function(argument)
