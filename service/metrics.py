"""What is measured, as Prometheus reads it: the text of GET /metrics.

`meters` holds the numbers; a collector makes metrics of them when somebody scrapes, in a registry of its own, so that
two services in one process do not count for each other. Labels come from tables of the service alone. What has to be
asked of the store is asked first, and for a second at most: a scrape is answered while the store is away, and says so.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from math import inf
from typing import Any, Final, NamedTuple, Protocol

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from service.errors import StoreFull, StoreUnavailable
from service.meters import STATUSES, CompileMeters, Histogram, RequestMeters, StoreMeters

# Below the ten seconds that Prometheus waits for a scrape.
PATIENCE: Final = 1.0


class Text(Protocol):
    """Who gives what GET /metrics is answered with: the text, and its media type, for an Accept."""

    async def text(self, accept: str) -> tuple[bytes, str]: ...


class Gauge(NamedTuple):
    """What is so and so much when it is looked at."""

    name: str
    help: str
    read: Callable[[], float]


class Counter(NamedTuple):
    """What somebody counts by the values of one label."""

    name: str
    help: str
    label: str
    read: Callable[[], Mapping[str, float]]


class _Labelled(CollectorRegistry):
    """Puts the label `worker` to all samples."""

    def __init__(self, worker: int) -> None:
        super().__init__()
        self._label = {"worker": str(worker)}

    def collect(self) -> Iterator[Metric]:
        for family in super().collect():
            named = Metric(family.name, family.documentation, family.type, family.unit)
            named.samples = [sample._replace(labels=self._label | sample.labels) for sample in family.samples]
            yield named


class Metrics(Collector):
    """`count_sessions` asks the store how many sessions it has; `about` are the labels of `ravine_info`. All samples
    have the label `worker` where a number is given.
    """

    def __init__(
        self,
        requests: RequestMeters,
        store: StoreMeters,
        compilations: CompileMeters,
        count_sessions: Callable[[], Awaitable[int]],
        about: Mapping[str, str],
        worker: int | None = None,
    ) -> None:
        self._requests = requests
        self._store = store
        self._compilations = compilations
        self._count_sessions = count_sessions
        self._about = dict(about)
        self._sessions: int | None = None
        self._writing: dict[bool, asyncio.Task[tuple[bytes, str]]] = {}  # by whether it is OpenMetrics
        self._gauges: list[Gauge] = []
        self._counters: list[Counter] = []
        self._registry = CollectorRegistry() if worker is None else _Labelled(worker)
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        GCCollector(registry=self._registry)
        self._registry.register(self)

    def gauge(self, name: str, help_: str, read: Callable[[], float]) -> None:
        """One more, which `read` gives whenever somebody scrapes."""
        self._gauges.append(Gauge(name, help_, read))

    def counter(self, name: str, help_: str, label: str, read: Callable[[], Mapping[Any, float]]) -> None:
        """The same for what only grows; `name` is without its `_total`."""
        self._counters.append(Counter(name, help_, label, read))

    async def text(self, accept: str) -> tuple[bytes, str]:
        """All metrics and their media type: OpenMetrics where `accept` names it, else Prometheus' own text.

        Whoever asks while it is being written is given the same: scrapes are let in without end.
        """
        form = "application/openmetrics-text" in accept
        writing = self._writing.get(form)
        if writing is None:
            writing = self._writing[form] = asyncio.create_task(self._text(form))
            writing.add_done_callback(lambda _: self._writing.pop(form))
        return await asyncio.shield(writing)

    async def _text(self, open_: bool) -> tuple[bytes, str]:
        try:
            async with asyncio.timeout(PATIENCE):
                self._sessions = await self._count_sessions()
        except (StoreUnavailable, StoreFull, TimeoutError):
            self._sessions = None
        # A thousand lines take 10 ms: in a thread, so that steps go on meanwhile.
        if open_:
            return await asyncio.to_thread(openmetrics.generate_latest, self._registry), openmetrics.CONTENT_TYPE_LATEST
        return await asyncio.to_thread(generate_latest, self._registry), CONTENT_TYPE_PLAIN_0_0_4

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that a registration asks for no values."""
        return ()

    def collect(self) -> Iterator[Metric]:
        yield _gauge("ravine_info", "1; what runs, in its labels.", 1, self._about)
        yield from self._of_requests()
        yield from self._of_store()
        yield from self._of_compilations()
        for gauge in self._gauges:
            yield _gauge(gauge.name, gauge.help, gauge.read())
        for counter in self._counters:
            yield _by(counter.name, counter.help, counter.label, counter.read())

    def _of_requests(self) -> Iterator[Metric]:
        labels = ("method", "route")
        answered = CounterMetricFamily(
            "ravine_http_requests", "Requests that are over, by the class of their status.", labels=(*labels, "status")
        )
        seconds = HistogramMetricFamily(
            "ravine_http_request_duration_seconds",
            "From the first byte of a request to the last of its reply, waiting on purpose included.",
            labels=labels,
        )
        for route, series in list(self._requests.answered.items()):
            for status, count in zip(STATUSES, series.statuses, strict=True):
                # Zeros as well, or a rate would not see the first one; but no class that none of our replies has.
                if status != "1xx":
                    answered.add_metric((*route, status), count)
            if any(series.seconds.counts):
                _add(seconds, route, series.seconds)
        yield answered
        yield seconds
        yield _by("ravine_http_refused", "Requests refused, by the problem.", "problem", self._requests.refused)

    def _of_store(self) -> Iterator[Metric]:
        store = self._store
        yield _gauge("ravine_store_up", "1 if the store answered this scrape, else 0.", self._sessions is not None)
        stored = GaugeMetricFamily("ravine_sessions_stored", "Sessions in the store, hot and cold, of all tenants.")
        if self._sessions is not None:
            stored.add_metric((), self._sessions)
        yield stored
        seconds = HistogramMetricFamily(
            "ravine_store_call_duration_seconds", "From a call of the store to its answer.", labels=("call",)
        )
        for call, histogram in list(store.calls.items()):
            _add(seconds, (call,), histogram)
        yield seconds
        yield _by(
            "ravine_store_failures", "Calls without an answer, or refused by a full store.", "call", store.failures
        )
        entries = HistogramMetricFamily(
            "ravine_commit_entries", "Entries that went to a log in one commit: one for each contribution of a batch."
        )
        _add(entries, (), store.entries)
        yield entries
        yield _counter("ravine_log_bytes", "Bytes written to the logs of sessions.", store.log_bytes)
        yield _counter("ravine_snapshots", "Snapshots written.", store.snapshots)
        yield _counter("ravine_snapshot_bytes", "Bytes written as snapshots.", store.snapshot_bytes)
        yield _counter("ravine_session_loads", "Sessions read from the store, log and all.", store.loads)

    def _of_compilations(self) -> Iterator[Metric]:
        done = self._compilations
        yield _gauge("ravine_compiling", "Optimizers that are being compiled.", done.begun - done.done)
        yield _counter("ravine_compilations", "Optimizers compiled.", done.done)
        yield _counter("ravine_compilation_seconds", "Seconds that compiling took.", done.seconds)


def _gauge(name: str, help_: str, value: float, labels: Mapping[str, str] | None = None) -> Metric:
    family = GaugeMetricFamily(name, help_, labels=tuple(labels or ()))
    family.add_metric(tuple((labels or {}).values()), value)
    return family


def _counter(name: str, help_: str, value: float) -> Metric:
    """`name` without the `_total` that it is shown with."""
    return CounterMetricFamily(name, help_, value)


def _by(name: str, help_: str, label: str, counts: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(name, help_, labels=(label,))
    for value, count in list(counts.items()):
        family.add_metric((value,), count)
    return family


def _add(family: HistogramMetricFamily, labels: Iterable[str], histogram: Histogram) -> None:
    counts, below, buckets = list(histogram.counts), 0, []
    for bound, count in zip((*histogram.bounds, inf), counts, strict=True):
        below += count
        buckets.append(("+Inf" if bound == inf else repr(float(bound)), below))
    family.add_metric(tuple(labels), buckets, histogram.total)
