"""GET /metrics: what it counts, that Prometheus reads it, and that the dashboard and the alerts name what is there."""

import json
import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import prometheus_client
import pytest
import yaml
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families as families

from core.evaluate import Evaluator
from service.meters import METHODS, OTHER, STATUSES, Histogram, RequestMeters, Route
from service.operations import OPERATIONS, PAGES
from service.problem_table import PROBLEMS
from tests.http.refusals import refused
from tests.running import ROOT, Server, serving
from tests.wire import create

DEPLOY = ROOT / "deploy"
STEPS = "/v1/sessions/{session}/steps"
STEP = {"gradients": {"w": [1.0, 2.0]}}


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service that nobody else calls, with room for a few small sessions."""
    with serving(tmp_path_factory.mktemp("metrics") / "data", environment={"RAVINE_MEMORY": "64KiB"}) as running:
        yield running


@pytest.fixture
def caller(counted: Server) -> Iterator[httpx.Client]:
    with counted.client() as open_client:
        yield open_client


def read(client: httpx.Client) -> dict[str, Metric]:
    reply = client.get("/metrics")
    assert reply.status_code == 200, reply.text
    return {family.name: family for family in families(reply.text)}


def value(found: dict[str, Metric], sample: str, **labels: str) -> float:
    """The sum of the samples of that name with these labels, and any others."""
    name = sample.removesuffix("_total")
    for part in ("_bucket", "_sum", "_count"):
        name = name.removesuffix(part) if name.removesuffix(part) in found else name
    return sum(
        each.value for each in found[name].samples if each.name == sample and labels.items() <= each.labels.items()
    )


def grown(client: httpx.Client, before: dict[str, Metric], sample: str, **labels: str) -> float:
    return value(read(client), sample, **labels) - value(before, sample, **labels)


# -- the text ----------------------------------------------------------------------------------------------------------


def test_both_texts_are_read_by_prometheus_own_parsers(caller: httpx.Client) -> None:
    plain = caller.get("/metrics")
    assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert plain.headers["cache-control"] == "no-store"
    accepted = {"Accept": "application/openmetrics-text;version=1.0.0;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"}
    strict = caller.get("/metrics", headers=accepted)
    assert strict.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0; charset=utf-8")
    told = {family.name: family for family in families(plain.text)}
    told_strictly = {family.name: family for family in openmetrics_families(strict.text)}
    assert told.keys() == told_strictly.keys()
    for family in told.values():
        assert family.documentation, family.name
        assert family.type in ("counter", "gauge", "histogram"), family.name
        series = [(sample.name, *sorted(sample.labels.items())) for sample in family.samples]
        assert len(series) == len(set(series)), family.name
    assert all(name.startswith(("ravine_", "process_", "python_")) for name in told)
    assert told["process_resident_memory_bytes"].samples[0].value > 1e6
    (info,) = told["ravine_info"].samples
    assert info.labels.items() >= {"store": "embedded", "ack": "memory"}.items()


@pytest.mark.parametrize("accept", ["application/openmetrics-text; version=banana; escaping=no", "x" * 4000, ",;=,"])
def test_any_accept_is_answered(caller: httpx.Client, accept: str) -> None:
    assert caller.get("/metrics", headers={"Accept": accept}).status_code == 200


def test_its_head_and_its_query(caller: httpx.Client) -> None:
    assert caller.head("/metrics").status_code == 200
    refused(caller.get("/metrics?name=ravine_info"), 422, "invalid-request")
    assert "get" in caller.get("/openapi.json").json()["paths"]["/metrics"]


# -- requests ----------------------------------------------------------------------------------------------------------


def test_requests_are_counted_by_route_method_and_status(caller: httpx.Client) -> None:
    session = create(caller, optimizer="sgd", params={"w": [1.0, 2.0]})["id"]
    before = read(caller)
    for _ in range(5):
        assert caller.post(f"/v1/sessions/{session}/steps", json=STEP).status_code == 200
    refused(caller.post(f"/v1/sessions/{session}/steps", json={"gradients": {"x": 1.0}}), 422, "unknown-tensor")
    refused(caller.post("/v1/sessions/none/steps", json=STEP), 404, "session-not-found")
    caller.head(f"/v1/sessions/{session}/params")
    caller.get("/v1/optimizers/adam")
    caller.request("PROPFIND", f"/v1/sessions/{session}/steps")
    for path in ("/nothing", "/v1/sessions/a/b/c", "/v1/sessions//steps", "/x/sessions/a/steps", "/v1/steps"):
        assert caller.get(path).status_code == 404

    def requests(method: str, route: str, status: str) -> float:
        return grown(caller, before, "ravine_http_requests_total", method=method, route=route, status=status)

    assert requests("POST", STEPS, "2xx") == 5
    assert requests("POST", STEPS, "4xx") == 2
    assert requests("HEAD", "/v1/sessions/{session}/params", "2xx") == 1
    assert requests("GET", "/v1/optimizers/{kind}", "2xx") == 1
    assert requests(OTHER, STEPS, "4xx") == 1
    assert requests("GET", OTHER, "4xx") == 5
    assert requests("GET", "/metrics", "2xx") > 1
    for problem, count in (
        ("unknown-tensor", 1),
        ("session-not-found", 1),
        ("method-not-allowed", 1),
        ("not-found", 5),
    ):
        assert grown(caller, before, "ravine_http_refused_total", problem=problem) == count, problem
    assert {sample.labels["problem"] for sample in before["ravine_http_refused"].samples} == set(PROBLEMS)


def test_every_request_is_in_one_bucket(caller: httpx.Client) -> None:
    session = create(caller, optimizer="sgd", params={"w": [1.0, 2.0]})["id"]
    caller.post(f"/v1/sessions/{session}/steps", json=STEP)
    found = read(caller)
    labels = {"method": "POST", "route": STEPS}
    name = "ravine_http_request_duration_seconds"
    buckets = [
        (float(each.labels["le"]), each.value)
        for each in found[name].samples
        if each.name == f"{name}_bucket" and labels.items() <= each.labels.items()
    ]
    assert buckets == sorted(buckets)
    assert buckets[-1] == (float("inf"), value(found, f"{name}_count", **labels))
    assert value(found, f"{name}_count", **labels) == value(found, "ravine_http_requests_total", **labels)
    assert value(found, f"{name}_sum", **labels) > 0


def test_labels_come_from_the_tables_alone() -> None:
    """Whatever is asked for, there are no more series than routes and methods."""
    routes = [Route(each.method, each.path) for each in OPERATIONS] + [Route("GET", page) for page in PAGES]
    meters, chance = RequestMeters(routes, PROBLEMS), random.Random(1)
    words = [
        "v1",
        "sessions",
        "ses_1",
        "steps",
        "params",
        "rounds",
        "current",
        "optimizers",
        "",
        "problems",
        "{session}",
    ]
    for _ in range(20_000):
        path = "/" + "/".join(chance.choices(words, k=chance.randrange(6)))
        meters.end(chance.choice(["GET", "POST", "BREW", "X"]), path, chance.choice([0, 200, 404, 499, 503]), 0.001)
        meters.refuse(chance.choice([*PROBLEMS, "nonsense", ""]))
    paths = {route.path for route in routes} | {OTHER}
    assert {route.path for route in meters.answered} == paths
    assert {route.method for route in meters.answered} <= METHODS | {OTHER}
    assert set(meters.refused) == set(PROBLEMS)
    counted = sum(sum(series.statuses) for series in meters.answered.values())
    assert counted == 20_000 == sum(sum(series.seconds.counts) for series in meters.answered.values())
    # As the routers see it, whatever was met before.
    for path, template in (
        ("/v1/sessions/ses_1/steps", STEPS),
        ("/v1/sessions/ses_1/rounds/current", "/v1/sessions/{session}/rounds/current"),
        ("/v1/sessions/steps", "/v1/sessions/{session}"),
        ("/v1/optimizers/adam", "/v1/optimizers/{kind}"),
        ("/problems/not-found", "/problems/{slug}"),
        ("/v1/sessions//steps", OTHER),
        ("/v1/sessions/ses_1/steps/", OTHER),
        ("/v2/sessions/ses_1/steps", OTHER),
        ("*", OTHER),
    ):
        assert meters.template(path) == template, path
        meters.end("POST", path, 200, 0.001)
        before = meters.answered[Route("POST", template)].statuses.copy()
        meters.end("POST", path, 304, 0.001)
        after = meters.answered[Route("POST", template)].statuses
        assert [new - old for new, old in zip(after, before, strict=True)] == [0, 0, 0, 1, 0, 0], path


def test_a_client_that_has_gone_is_no_status_of_ours() -> None:
    meters = RequestMeters([Route("GET", "/livez")], ())
    for status in (0, 499, 200, 304, 404, 503):
        meters.end("GET", "/livez", status, 0.001)
    assert dict(zip(STATUSES, meters.answered[Route("GET", "/livez")].statuses, strict=True)) == {
        "gone": 2,
        "1xx": 0,
        "2xx": 1,
        "3xx": 1,
        "4xx": 1,
        "5xx": 1,
    }


def test_histograms_count_as_prometheus_own() -> None:
    registry, chance = prometheus_client.CollectorRegistry(), random.Random(2)
    bounds = (0.001, 0.01, 0.1, 1.0)
    theirs = prometheus_client.Histogram("h", "h", buckets=bounds, registry=registry)
    ours = Histogram(bounds)
    for seconds in [*bounds, 0.0, 2.0, *(10 ** chance.uniform(-4, 1) for _ in range(1000))]:
        theirs.observe(seconds)
        ours.observe(seconds)
    below = 0
    for bound, count in zip(("0.001", "0.01", "0.1", "1.0", "+Inf"), ours.counts, strict=True):
        below += count
        assert registry.get_sample_value("h_bucket", {"le": bound}) == below
    assert registry.get_sample_value("h_sum") == ours.total


# -- sessions and the store --------------------------------------------------------------------------------------------


def test_sessions_hot_and_stored(caller: httpx.Client) -> None:
    before = read(caller)
    made = [create(caller, optimizer="sgd", params={"w": [1.0, 2.0]})["id"] for _ in range(12)]
    for session in made:
        caller.post(f"/v1/sessions/{session}/steps", json=STEP)
    found = read(caller)
    assert value(found, "ravine_sessions_stored") - value(before, "ravine_sessions_stored") == 12
    assert 1 <= value(found, "ravine_sessions_hot") < 12
    limit = value(found, "ravine_sessions_hot_bytes_limit")
    assert 0 < value(found, "ravine_sessions_hot_bytes") <= limit == 64 * 1024
    loads = value(found, "ravine_session_loads_total")
    caller.post(f"/v1/sessions/{made[0]}/steps", json=STEP)
    assert grown(caller, found, "ravine_session_loads_total") == 1, loads
    for session in made:
        assert caller.delete(f"/v1/sessions/{session}").status_code == 204
    assert value(read(caller), "ravine_sessions_stored") == value(before, "ravine_sessions_stored")


def test_what_goes_to_the_store(counted: Server, caller: httpx.Client) -> None:
    session = create(caller, optimizer="sgd", params={"w": np.zeros(1000).tolist()})["id"]
    before = read(caller)
    body = {"gradients": {"w": np.ones(1000).tolist()}, "return": "none"}
    with ThreadPoolExecutor(8) as threads:
        sent = [threads.submit(caller.post, f"/v1/sessions/{session}/steps", json=body) for _ in range(40)]
        assert {each.result().status_code for each in sent} == {200}
    found = read(caller)
    commits = value(found, "ravine_commit_entries_count") - value(before, "ravine_commit_entries_count")
    entries = value(found, "ravine_commit_entries_sum") - value(before, "ravine_commit_entries_sum")
    assert entries == 40
    assert 1 <= commits <= 40
    written = value(found, "ravine_log_bytes_total") - value(before, "ravine_log_bytes_total")
    assert 40 * 4000 < written < 40 * 6000
    calls = "ravine_store_call_duration_seconds_count"
    assert value(found, calls, call="commit") - value(before, calls, call="commit") >= commits
    assert value(found, calls, call="read") > value(before, calls, call="read")
    deadline = time.monotonic() + 10
    while not grown(caller, before, "ravine_snapshots_total"):  # it is written beside the steps
        assert time.monotonic() < deadline, "64 KiB of log without a snapshot"
        caller.post(f"/v1/sessions/{session}/steps", json=body)
    assert grown(caller, before, "ravine_snapshot_bytes_total") > 4000


def test_a_store_that_is_away_is_told(counted: Server, caller: httpx.Client) -> None:
    before = read(caller)
    assert value(before, "ravine_store_up") == 1
    store = counted.valkey_pid()
    os.kill(store, signal.SIGSTOP)
    try:
        found = read(caller)
    finally:
        os.kill(store, signal.SIGCONT)
    assert value(found, "ravine_store_up") == 0
    assert found["ravine_sessions_stored"].samples == []
    after = read(caller)
    assert value(after, "ravine_store_up") == 1
    assert value(after, "ravine_sessions_stored") == value(before, "ravine_sessions_stored")


def test_calls_that_the_store_broke_off_are_counted(counted: Server, caller: httpx.Client) -> None:
    session = create(caller, optimizer="sgd", params={"w": [1.0, 2.0]})["id"]
    before = read(caller)
    os.kill(counted.valkey_pid(), signal.SIGKILL)  # the service starts it again, and tries again meanwhile
    caller.get(f"/v1/sessions/{session}")
    assert grown(caller, before, "ravine_store_failures_total", call="read") > 0
    deadline = time.monotonic() + 20
    while not value(read(caller), "ravine_store_up"):
        assert time.monotonic() < deadline


def test_connections_and_waits(counted: Server, caller: httpx.Client) -> None:
    session = create(caller, optimizer="sgd", params={"w": [1.0, 2.0]})["id"]

    def poll() -> None:
        with counted.client() as client:
            client.get(f"/v1/sessions/{session}/params?after=0&wait=20")

    waiting = [threading.Thread(target=poll) for _ in range(3)]
    for thread in waiting:
        thread.start()
    deadline = time.monotonic() + 10
    while value(found := read(caller), "ravine_http_waits") < 3:
        assert time.monotonic() < deadline
    assert value(found, "ravine_http_connections") >= 4
    caller.post(f"/v1/sessions/{session}/steps", json=STEP)
    for thread in waiting:
        thread.join()
    assert value(read(caller), "ravine_http_waits") == 0
    assert value(found, "ravine_http_requests_in_flight") == 0, "neither who waits nor the scrape itself"


@pytest.mark.skipif(not Evaluator().available, reason="needs the extra `jit`")
def test_compilations(caller: httpx.Client) -> None:
    before = read(caller)
    session = create(caller, optimizer="sgd", shapes={"w": [20_000]})["id"]
    body = {"gradients": {"w": np.ones(20_000).tolist()}, "return": "none"}
    assert caller.post(f"/v1/sessions/{session}/steps", json=body).status_code == 200
    deadline = time.monotonic() + 60
    while not grown(caller, before, "ravine_compilations_total"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert value(read(caller), "ravine_compiling") == 0
    assert grown(caller, before, "ravine_compilation_seconds_total") > 0


# -- what is made of them ----------------------------------------------------------------------------------------------

_NAME = re.compile(r"\b(?:ravine|process|python)_[a-z_]+")
_MATCHED = re.compile(r"\{([^{}]*(?:\{\w+\}[^{}]*)*)\}")
_GROUPED = re.compile(r"\bby \(([^)]*)\)")
# What Prometheus adds.
_ADDED = {"job", "instance"}
# Of a service with several workers alone (test_workers.py looks at those).
_OF_WORKERS = {"ravine_worker_up", "ravine_handovers_total"}


def expressions_of_the_dashboard() -> list[str]:
    dashboard = json.loads((DEPLOY / "grafana" / "ravine.json").read_text())
    queries = [each["definition"] for each in dashboard["templating"]["list"] if each["type"] == "query"]
    return queries + [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]


def alerts() -> list[dict[str, str]]:
    (group,) = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    rules: list[dict[str, str]] = group["rules"]
    return rules


def check(expressions: Iterable[str], found: dict[str, Metric]) -> set[str]:
    """Every metric that they name is exposed, and every label is one of its own. Gives the names."""
    exposed = {sample.name: set(sample.labels) for family in found.values() for sample in family.samples}
    named = set()
    for expression in expressions:
        names = set(_NAME.findall(expression))
        if names <= _OF_WORKERS and not names & exposed.keys():
            continue
        assert names <= exposed.keys(), expression
        known = {label for name in names for label in exposed[name]} | _ADDED
        matched = {
            label for inner in _MATCHED.findall(expression) for label in re.findall(r"(\w+)(?:=~|!=|!~|=)\"", inner)
        }
        grouped = {label.strip() for inner in _GROUPED.findall(expression) for label in inner.split(",")}
        assert matched | grouped <= known, expression
        named |= names
    return named


def test_the_dashboard_names_what_is_exposed(caller: httpx.Client) -> None:
    session = create(caller, optimizer="sgd", params={"w": [1.0, 2.0]})["id"]
    caller.post(f"/v1/sessions/{session}/steps", json=STEP)
    found = read(caller)
    named = check(expressions_of_the_dashboard(), found)
    ours = {name for name in found if name.startswith("ravine_")}
    shown = {name for name in ours if any(each.startswith(name) for each in named)}
    assert shown == ours, "and what is exposed is shown"
    with pytest.raises(AssertionError):
        check(["sum(ravine_nothing)"], found)
    with pytest.raises(AssertionError):
        check(['ravine_store_up{colour="red"}'], found)


def test_the_panels_of_the_dashboard_do_not_overlap() -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "ravine.json").read_text())
    taken: set[tuple[int, int]] = set()
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids) > 20
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_the_alerts_name_what_is_exposed(caller: httpx.Client) -> None:
    rules = alerts()
    check([rule["expr"] for rule in rules], read(caller))
    for rule in rules:
        assert rule["labels"]["severity"] in ("page", "ticket")  # type: ignore[index]
        for slug in re.findall(r'problem="([^"]*)"', rule["expr"]):
            assert slug in PROBLEMS, rule["alert"]
    page = (ROOT / "docs" / "operations.md").read_text()
    assert [rule["alert"] for rule in rules if f"`{rule['alert']}`" not in page] == []


def test_prometheus_is_told_where_they_are() -> None:
    settings = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    assert [(DEPLOY / name).is_file() for name in settings["rule_files"]] == [True]
    (job,) = settings["scrape_configs"]
    assert job["job_name"] == "ravine"
    assert "metrics_path" not in job, "it is where Prometheus looks by itself"
