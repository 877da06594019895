"""Each exception becomes one problem document, and each problem has a page."""

from html.parser import HTMLParser
from typing import Any

import pytest
from structlog.testing import capture_logs

from core import errors as core
from service import errors, examples, problems
from service.errors import Fault
from service.problem_table import PROBLEMS
from service.problems import MethodNotAllowed, NotFound, page_of, problem_of
from service.wire import errors as wire
from service.wire.json import loads


def leaves(cls: type[Exception]) -> list[type[Exception]]:
    below = cls.__subclasses__()
    return [leaf for child in below for leaf in leaves(child)] if below else [cls]


# Rounds are closed by the service itself: no call asks for it, and nobody is told that there was nothing to close. What
# was superseded is looked at again.
INWARD = {core.RoundOpen, errors.Superseded}
REFUSALS = [
    leaf
    for root in (core.CoreError, errors.ServiceError, wire.WireError)
    for leaf in leaves(root)
    if leaf not in INWARD
]


@pytest.mark.parametrize("cls", REFUSALS, ids=lambda cls: cls.__name__)
def test_no_refusal_is_taken_for_a_bug(cls: type[Exception]) -> None:
    assert any(base in problems.SLUGS for base in cls.__mro__), f"{cls.__name__} is not in the table"


@pytest.mark.parametrize("slug", sorted(PROBLEMS))
def test_every_problem_has_an_example_that_is_that_problem(slug: str) -> None:
    body = examples.problem(slug, "/v1/sessions/{session}/steps")
    assert body["type"] == f"/problems/{slug}"
    assert body["status"] == PROBLEMS[slug].status
    assert body["instance"] == f"/v1/sessions/{examples.SESSION_ID}/steps"
    assert body["title"]
    assert body["detail"]


CASES: list[tuple[Exception, int, str, dict[str, Any], dict[bytes, bytes]]] = [
    (
        core.ShapeMismatch("w", (2, 3), (3, 2)),
        422,
        "shape-mismatch",
        {"tensor": "w", "expected": [2, 3], "received": [3, 2]},
        {},
    ),
    (core.NonFinite("w", "float32"), 422, "non-finite", {"tensor": "w"}, {}),
    (core.UnknownTensor("x", ["w"]), 422, "unknown-tensor", {"tensor": "x"}, {}),
    (core.InvalidRecipe("/lr", "no"), 422, "invalid-request", {"errors": [{"pointer": "/lr", "detail": "no"}]}, {}),
    (wire.InvalidValue("/a/0", "no"), 422, "invalid-request", {"errors": [{"pointer": "/a/0", "detail": "no"}]}, {}),
    (
        errors.InvalidRequest([Fault("/a", "one"), Fault("/b", "two")]),
        422,
        "invalid-request",
        {"errors": [{"pointer": "/a", "detail": "one"}, {"pointer": "/b", "detail": "two"}]},
        {},
    ),
    (errors.StepConflict(7, "abc"), 412, "step-conflict", {"step": 7}, {}),
    (
        core.StaleGradient(41, 9, 8),
        409,
        "stale-gradient",
        {"step": 41, "staleness": 9, "max_staleness": 8},
        {},
    ),
    (core.BaseStepAhead(42, 41), 409, "base-step-ahead", {"step": 41}, {}),
    (core.NotPulled("w1", 40, 41), 409, "not-pulled", {"step": 40}, {}),
    (core.AlreadyContributed(42, "w1"), 409, "already-contributed", {"round": 42, "worker": "w1"}, {}),
    (
        core.TooFarAhead("w1", 7, 4, 2, 41),
        409,
        "too-far-ahead",
        {"clock": 7, "slowest": 4, "bound": 2},
        {b"retry-after": b"1"},
    ),
    (core.WorkerRequired("no"), 422, "worker-required", {}, {}),
    (core.BaseStepRequired("no"), 422, "base-step-required", {}, {}),
    (core.NotReducible("no"), 422, "not-reducible", {}, {}),
    (errors.NoRounds("ssp"), 404, "no-rounds", {}, {}),
    (
        errors.StateLost("ses_1", errors.Place(9, '"9-a"'), errors.Place(7, '"7-b"')),
        409,
        "state-lost",
        {"acknowledged": {"step": 9, "etag": '"9-a"'}, "found": {"step": 7, "etag": '"7-b"'}},
        {},
    ),
    (errors.UnknownFormat("it", "2", ["1"]), 501, "unknown-format", {"format": "2", "supported": ["1"]}, {}),
    (wire.BodyTooLarge(10), 413, "body-too-large", {"limit": 10}, {}),
    (
        errors.QuotaExceeded("rate", "no", errors.Standing("tenant", 1000, 0, 3, window=60)),
        429,
        "quota-exceeded",
        {"quota": "rate", "limit": 1000},
        {b"retry-after": b"3", b"ratelimit-policy": b'"tenant";q=1000;w=60', b"ratelimit": b'"tenant";r=0;t=3'},
    ),
    (
        errors.QuotaExceeded("sessions", "no", errors.Standing("sessions", 10, 0, 60, unit="sessions")),
        429,
        "quota-exceeded",
        {"quota": "sessions", "limit": 10},
        {b"retry-after": b"60", b"ratelimit-policy": b'"sessions";q=10;qu="sessions"', b"ratelimit": b'"sessions";r=0'},
    ),
    (errors.StoreUnavailable("redis://secret"), 503, "store-unavailable", {}, {b"retry-after": b"1"}),
    (
        errors.UnsupportedMedia("Content-Type", "text/plain", ["application/json"]),
        415,
        "unsupported-media-type",
        {"accepted": ["application/json"]},
        {b"accept": b"application/json"},
    ),
    (
        errors.UnsupportedMedia("Content-Encoding", "br", ["gzip", "zstd"]),
        415,
        "unsupported-media-type",
        {"accepted": ["gzip", "zstd"]},
        {b"accept-encoding": b"gzip, zstd"},
    ),
    (errors.NotAcceptable("text/html", ["text/csv"]), 406, "not-acceptable", {"offered": ["text/csv"]}, {}),
    (MethodNotAllowed("PUT", ["GET", "POST"]), 405, "method-not-allowed", {}, {b"allow": b"GET, POST"}),
    (NotFound(), 404, "not-found", {}, {}),
]


@pytest.mark.parametrize(("error", "status", "slug", "members", "headers"), CASES, ids=[case[2] for case in CASES])
def test_the_document_of_an_exception(
    error: Exception, status: int, slug: str, members: dict[str, Any], headers: dict[bytes, bytes]
) -> None:
    problem = problem_of(error, "/v1/sessions/x")
    body = problem.body()
    assert {name: body.pop(name) for name in ("type", "status", "instance")} == {
        "type": f"/problems/{slug}",
        "status": status,
        "instance": "/v1/sessions/x",
    }
    assert {name: value for name, value in body.items() if name not in ("title", "detail")} == members
    assert headers.items() <= dict(problem.headers).items()
    response = problem.response()
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert loads(bytes(response.body)) == problem.body()


@pytest.mark.parametrize("error", [RuntimeError("the secret"), KeyError("the secret"), errors.Corrupt("the secret")])
def test_the_services_own_faults_are_logged_and_not_told(error: Exception) -> None:
    with capture_logs() as logs:
        problem = problem_of(error, "/v1/sessions/x")
    assert problem.status == 500
    assert b"secret" not in problem.body_bytes()
    assert [entry["exc_info"] for entry in logs] == [error]


def test_nothing_of_the_store_is_told() -> None:
    assert b"secret" not in problem_of(errors.StoreUnavailable("redis://secret"), "/").body_bytes()


def test_any_path_makes_a_uri_and_valid_json() -> None:
    body = loads(problem_of(NotFound(), '/v1/\x00\n"é /..').body_bytes())
    assert isinstance(body, dict)
    assert body["instance"] == "/v1/%00%0A%22%C3%A9%20/.."


class Page(HTMLParser):
    """Collects what an HTML page would load, and whether its elements are closed."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.loads += [tag] if tag in ("script", "img", "link", "iframe") or "src" in given else []
        self.links += [given["href"] or ""] if tag == "a" else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(text: str) -> Page:
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    assert page.loads == []
    return page


def test_the_index_links_to_a_page_for_every_problem() -> None:
    links = parsed(problems.index()).links
    assert {f"/problems/{slug}" for slug in PROBLEMS} <= set(links)


@pytest.mark.parametrize("slug", sorted(PROBLEMS))
def test_every_problem_has_a_page_of_its_own(slug: str) -> None:
    text = page_of(slug)
    parsed(text)
    assert slug in text
    assert "How to mend it" in text


def test_there_is_no_page_for_another_slug() -> None:
    with pytest.raises(LookupError):
        page_of("nope")
