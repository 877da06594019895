"""Bodies that are not JSON, and values in them that are not allowed: told with a pointer, and nothing changes."""

import copy
import json
from typing import Any

import httpx
import pytest

from tests.http.refusals import pointers, refused, unchanged
from tests.running import Server
from tests.wire import create

JSON = {"Content-Type": "application/json"}
BASES: dict[str, dict[str, Any]] = {
    "create": {
        "optimizer": {"kind": "adam", "lr": 0.1, "beta1": 0.9, "eps": 1e-8, "eps_inside": False},
        "params": {"w": [[1.0, 2.0], [3.0, 4.0]], "b": 0.5},
        "groups": [{"match": "b", "lr": 0.5, "frozen": False}],
        "averaging": {"kind": "ema", "decay": 0.9},
    },
    "shapes": {
        "optimizer": {"kind": "sgd", "lr": {"kind": "cosine", "init": 0.1, "steps": 10, "floor": 0.0}},
        "shapes": {"w": [2, 3]},
        "averaging": {"kind": "polyak", "start": 3},
    },
    "patch": {"optimizer": {"lr": 0.1, "beta2": 0.5}, "groups": [{"match": "w", "lr": 0.5}]},
    "step": {
        "gradients": {"w": {"indices": [0], "values": [[1.0, 2.0]]}, "b": 0.5},
        "loss": 0.5,
        "weight": 1.0,
        "base_step": 0,
    },
    "dense": {"gradients": {"w": [[1.0, 2.0], [3.0, 4.0]], "b": 0.5}},
    "put": {"params": {"w": [[1.0, 2.0], [3.0, 4.0]], "b": 0.5}},
}
NUMBERS = [
    *[("create", place) for place in ("/optimizer/lr", "/optimizer/beta1", "/optimizer/eps")],
    *[("create", place) for place in ("/groups/0/lr", "/averaging/decay", "/params/b", "/params/w/1/0")],
    *[("shapes", place) for place in ("/optimizer/lr/init", "/optimizer/lr/steps", "/optimizer/lr/floor")],
    *[("shapes", place) for place in ("/shapes/w/1", "/averaging/start")],
    *[("patch", place) for place in ("/optimizer/lr", "/optimizer/beta2", "/groups/0/lr")],
    *[("step", place) for place in ("/loss", "/weight", "/base_step", "/gradients/b")],
    *[("step", place) for place in ("/gradients/w/indices/0", "/gradients/w/values/0/1")],
    *[("dense", place) for place in ("/gradients/w/1/0", "/gradients/b")],
    *[("put", place) for place in ("/params/w/0/1", "/params/b")],
]


@pytest.fixture(scope="module")
def session(server: Server) -> str:
    """At step 1."""
    with server.client() as client:
        made: str = create(client, optimizer="adam", params={"w": [[1.0, 2.0], [3.0, 4.0]], "b": 0.5})["id"]
        assert client.post(f"/v1/sessions/{made}/steps", json=BASES["dense"]).status_code == 200
    return made


def call(client: httpx.Client, session: str, base: str, content: bytes) -> httpx.Response:
    path = f"/v1/sessions/{session}"
    method, url = {
        "patch": ("PATCH", path),
        "step": ("POST", f"{path}/steps"),
        "dense": ("POST", f"{path}/steps"),
        "put": ("PUT", f"{path}/params"),
        "fork": ("POST", f"{path}/fork"),
    }.get(base, ("POST", "/v1/sessions"))
    return client.request(method, url, content=content, headers=JSON)


def with_text(base: str, place: str, text: str) -> bytes:
    """The body `base` with `text` as it is where the pointer `place` leads."""
    body = copy.deepcopy(BASES[base])
    target: Any = body
    *way, last = [int(token) if token.isdigit() else token for token in place.split("/")[1:]]
    for token in way:
        target = target[token]
    target[last] = "@@"
    return json.dumps(body).replace('"@@"', text).encode()


@pytest.mark.parametrize("base", BASES)
def test_the_bases_of_these_tests_are_taken(client: httpx.Client, base: str) -> None:
    made = create(client, optimizer="adam", params={"w": [[1.0, 2.0], [3.0, 4.0]], "b": 0.5})["id"]
    reply = call(client, made, base, json.dumps(BASES[base]).encode())
    assert reply.status_code in (200, 201), reply.text


# -- not JSON ----------------------------------------------------------------------------------------------------

MALFORMED = {
    "empty": b"",
    "blank": b" \r\n",
    "cut short": b'{"params": {"w": [1',
    "text": b"gradients",
    "form": b"a=1&b=2",
    "single quotes": b"{'a': 1}",
    "comment": b'{"a": 1} // b',
    "trailing comma": b'{"a": [1,]}',
    "two documents": b"{} {}",
    "not UTF-8": b'{"name": "\xff\xfe"}',
    "UTF-16": '{"name": "a"}'.encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf{}",
    "overlong": b'{"name": "\xc0\xaf"}',
    "surrogate": b'{"name": "\xed\xa0\x80"}',
    "lone escape": b'{"name": "\\ud800"}',
    "control character": b'{"name": "a\x01"}',
    "NUL": b'{"a": 1}\x00',
    "nan": b'{"a": nan}',
    "leading zero": b'{"a": 01}',
    "plus": b'{"a": +1}',
    "hex": b'{"a": 0x1}',
    "bare point": b'{"a": 1.}',
    "duplicate": b'{"a": 1, "a": 1}',
    "duplicate below": b'{"params": {"w": 1, "b": [2], "w": 1}}',
    "duplicate by escapes": b'{"a": 1, "\\u0061": 1}',
    "65 levels": b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}",
    "65 objects": b'{"a": ' * 65 + b"1" + b"}" * 65,
    "nesting bomb": b"[" * 100_000,
    "closed nesting bomb": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "megabytes of brackets": b"[" * 3_000_000,
}


@pytest.mark.parametrize("what", MALFORMED)
def test_what_is_not_json(client: httpx.Client, session: str, what: str) -> None:
    with unchanged(client, session):
        for base in ("create", "patch", "step", "put", "fork"):
            if MALFORMED[what] or base != "fork":  # which needs no body
                refused(call(client, session, base, MALFORMED[what]), 400, "malformed-json")


@pytest.mark.parametrize(("base", "place"), NUMBERS)
def test_literals_that_are_no_json(client: httpx.Client, session: str, base: str, place: str) -> None:
    with unchanged(client, session):
        for text in ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 400 + ".0", "-"):
            refused(call(client, session, base, with_text(base, place, text)), 400, "malformed-json")


def test_64_levels_are_read(client: httpx.Client, session: str) -> None:
    body = b'{"gradients": {"w": ' + b"[" * 62 + b"]" * 62 + b', "b": 1.0}}'
    with unchanged(client, session):
        document = refused(call(client, session, "dense", body), 422, "shape-mismatch")
    assert (document["tensor"], document["expected"]) == ("w", [2, 2])
    assert document["received"] == [1] * 61 + [0]


@pytest.mark.parametrize("document", ["[]", "null", "true", "1", '"text"', "[{}]"])
def test_what_is_no_object(client: httpx.Client, session: str, document: str) -> None:
    with unchanged(client, session):
        for base in ("create", "patch", "step", "put", "fork"):
            found = refused(call(client, session, base, document.encode()), 422, "invalid-request")
            assert pointers(found) == {""}


# -- no number where one belongs -----------------------------------------------------------------------------------


NO_NUMBERS = ["true", "false", '"1"', '""', "null", "{}"]
BEYOND = [str(2**53), str(-(2**53)), str(2**70), "9" * 400, "-" + "9" * 5000]


@pytest.mark.parametrize(("base", "place"), NUMBERS)
def test_what_is_no_number(client: httpx.Client, session: str, base: str, place: str) -> None:
    with unchanged(client, session):
        for text in NO_NUMBERS + BEYOND:
            found = refused(call(client, session, base, with_text(base, place, text)), 422, "invalid-request")
            # An empty object may be a schedule without its kind.
            allowed = {place, f"{place}/kind"} if text == "{}" else {place}
            assert pointers(found) <= allowed, (text, found)


@pytest.mark.parametrize("text", ["1.5", "1.0", "-1", "1e2"])
@pytest.mark.parametrize(
    ("base", "place"),
    [
        ("shapes", "/shapes/w/1"),
        ("shapes", "/optimizer/lr/steps"),
        ("shapes", "/averaging/start"),
        ("step", "/base_step"),
    ],
)
def test_what_is_no_integer(client: httpx.Client, session: str, base: str, place: str, text: str) -> None:
    found = refused(call(client, session, base, with_text(base, place, text)), 422, "invalid-request")
    assert pointers(found) == {place}


@pytest.mark.parametrize("text", ["1.5", "1.0", "[1]", '"0"', "true"])
def test_what_is_no_row_number(client: httpx.Client, session: str, text: str) -> None:
    with unchanged(client, session):
        body = with_text("step", "/gradients/w/indices/0", text)
        found = refused(call(client, session, "step", body), 422, "invalid-request")
        assert pointers(found) == {"/gradients/w/indices/0"}


# -- members of a step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"gradient": {}}, "/gradient"),
        ({"Loss": 1}, "/Loss"),
        ({"a/b~c": 1}, "/a~1b~0c"),
        ({"": 1}, "/"),
        ({"return": "everything"}, "/return"),
        ({"return": None}, "/return"),
        ({"return": ["params"]}, "/return"),
        ({"partial": 1}, "/partial"),
        ({"partial": "true"}, "/partial"),
        ({"partial": None}, "/partial"),
        ({"weight": 0}, "/weight"),
        ({"weight": -1}, "/weight"),
        ({"worker": ""}, "/worker"),
        ({"worker": "a b"}, "/worker"),
        ({"worker": "a" * 65}, "/worker"),
        ({"worker": "ä"}, "/worker"),
        ({"worker": "a\n"}, "/worker"),
        ({"worker": 1}, "/worker"),
        ({"base_step": -1}, "/base_step"),
        ({"gradients": None}, "/gradients"),
        ({"gradients": [1, 2]}, "/gradients"),
        ({"gradients": {"w": None, "b": 1}}, "/gradients/w"),
        ({"gradients": {"w": "1", "b": 1}}, "/gradients/w"),
        ({"gradients": {"w": [[1, 2], [3]], "b": 1}}, "/gradients/w/1"),
        ({"gradients": {"w": [[1, 2], 3], "b": 1}}, "/gradients/w/1"),
        ({"gradients": {"w": [1, [2, 3]], "b": 1}}, "/gradients/w/1"),
        ({"gradients": {"w": [[1, 2], [3, None]], "b": 1}}, "/gradients/w/1/1"),
        ({"gradients": {"w": {}, "b": 1}}, "/gradients/w"),
        ({"gradients": {"w": {"indices": [0]}, "b": 1}}, "/gradients/w"),
        ({"gradients": {"w": {"values": [[1, 2]]}, "b": 1}}, "/gradients/w"),
        ({"gradients": {"w": {"indices": [0], "values": [[1, 2]], "x": 1}, "b": 1}}, "/gradients/w"),
        ({"gradients": {"w": {"indices": 0, "values": [[1, 2]]}, "b": 1}}, "/gradients/w/indices"),
        ({"gradients": {"w": {"indices": [0], "values": [["1", 2]]}, "b": 1}}, "/gradients/w/values/0/0"),
        ({"params": [1]}, "/params"),
        ({"params": None}, "/params"),
        ({"hessian": [[1, 2], [3]]}, "/hessian/1"),
        ({"hessian": None}, "/hessian"),
    ],
)
def test_members_of_a_step(client: httpx.Client, session: str, change: dict[str, Any], place: str) -> None:
    body = json.dumps(BASES["dense"] | change).encode()
    with unchanged(client, session):
        found = refused(call(client, session, "dense", body), 422, "invalid-request")
        assert pointers(found) == {place}


def test_a_step_needs_gradients(client: httpx.Client, session: str) -> None:
    with unchanged(client, session):
        found = refused(call(client, session, "dense", b"{}"), 422, "invalid-request")
        assert pointers(found) == {"/gradients"}


def test_all_faults_of_a_step_are_told_at_once(client: httpx.Client, session: str) -> None:
    body = {"gradients": {}, "loss": "x", "weight": 0, "worker": "", "what": 1, "partial": 0}
    found = refused(call(client, session, "dense", json.dumps(body).encode()), 422, "invalid-request")
    assert pointers(found) == {"/loss", "/weight", "/worker", "/what", "/partial"}


@pytest.mark.parametrize(
    ("body", "place"),
    [({}, "/params"), ({"params": 1}, "/params"), ({"params": {}, "step": 1}, "/step"), ({"w": [1]}, "/w")],
)
def test_members_of_new_parameters(client: httpx.Client, session: str, body: Any, place: str) -> None:
    with unchanged(client, session):
        found = refused(call(client, session, "put", json.dumps(body).encode()), 422, "invalid-request")
        assert pointers(found) == {place}


def test_a_fork_takes_nothing(client: httpx.Client, session: str) -> None:
    with unchanged(client, session):
        refused(call(client, session, "fork", b'{"name": "n"}'), 422, "invalid-request")
