"""If-Match: a step, a change or a deletion only where the session still is what its sender saw."""

from typing import Any

import httpx
import pytest

from tests.http.refusals import refused, unchanged
from tests.wire import create

STEP = {"gradients": {"w": [1.0]}}


@pytest.fixture
def session(client: httpx.Client) -> str:
    """At step 2."""
    made: str = create(client, optimizer={"kind": "sgd", "lr": 1.0}, params={"w": [0.0]})["id"]
    for _ in range(2):
        assert client.post(f"/v1/sessions/{made}/steps", json=STEP).status_code == 200
    return made


def calls(session: str) -> list[tuple[str, str, Any]]:
    """Every call that If-Match guards; the last one ends the session."""
    path = f"/v1/sessions/{session}"
    return [
        ("POST", f"{path}/steps", STEP),
        ("PUT", f"{path}/params", {"params": {"w": [1.0]}}),
        ("PATCH", path, {"name": "n"}),
        ("DELETE", path, None),
    ]


def test_the_current_tag_and_the_current_step_hold(client: httpx.Client, session: str) -> None:
    for method, url, body in calls(session):
        etag = client.get(f"/v1/sessions/{session}").headers["etag"]
        reply = client.request(method, url, json=body, headers={"If-Match": etag})
        assert reply.status_code in (200, 204), reply.text
        if method != "DELETE":
            assert reply.headers["etag"] != etag
            shown = client.get(f"/v1/sessions/{session}")
            assert (shown.headers["etag"], shown.json()["step"]) == (reply.headers["etag"], 3)
    for number, (method, url, body) in enumerate(calls(create_at_step_2(client))):
        guard = {"If-Match": f'"{2 if number == 0 else 3}"'}
        assert client.request(method, url, json=body, headers=guard).status_code in (200, 204)


def create_at_step_2(client: httpx.Client) -> str:
    made: str = create(client, optimizer={"kind": "sgd", "lr": 1.0}, params={"w": [0.0]})["id"]
    for _ in range(2):
        client.post(f"/v1/sessions/{made}/steps", json=STEP)
    return made


@pytest.mark.parametrize("call", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "guard",
    ['"1"', '"3"', '"0", "1"', '"2-0000000000000000"', '"2-x"', 'W/"2"', '"02"', '"2.0"', '"-2"', '"two"', '""', '"*"'],
)
def test_any_other_tag_is_a_conflict(client: httpx.Client, session: str, call: int, guard: str) -> None:
    method, url, body = calls(session)[call]
    with unchanged(client, session):
        reply = client.request(method, url, json=body, headers={"If-Match": guard})
        assert refused(reply, 412, "step-conflict")["step"] == 2
    if "/" in url.removeprefix("/v1/sessions/"):
        shown = client.get(f"/v1/sessions/{session}")
        assert (reply.headers["ravine-step"], reply.headers["etag"]) == ("2", shown.headers["etag"])


@pytest.mark.parametrize("guard", ["*", '"2"', '"1", "2"', '"none", "2"', '"2" ,"9"'])
def test_one_of_several_is_enough(client: httpx.Client, session: str, guard: str) -> None:
    reply = client.post(f"/v1/sessions/{session}/steps", json=STEP, headers={"If-Match": guard})
    assert (reply.status_code, reply.json()["step"]) == (200, 3)


def test_a_tag_of_an_earlier_commit_at_the_same_step_is_a_conflict(client: httpx.Client, session: str) -> None:
    etag = client.get(f"/v1/sessions/{session}").headers["etag"]
    client.put(f"/v1/sessions/{session}/params", json={"params": {"w": [5.0]}})
    reply = client.post(f"/v1/sessions/{session}/steps", json=STEP, headers={"If-Match": etag})
    assert refused(reply, 412, "step-conflict")["step"] == 2


@pytest.mark.parametrize("call", [0, 1, 2, 3])
@pytest.mark.parametrize("guard", ["2", "'2'", '"2', '2"', '"2" "3"', 'w/"2"', '"a b"', "", ",", '*, "2"', '"2"; "3"'])
def test_what_is_no_precondition_is_refused(client: httpx.Client, session: str, call: int, guard: str) -> None:
    method, url, body = calls(session)[call]
    with unchanged(client, session):
        reply = client.request(method, url, json=body, headers={"If-Match": guard})
        assert refused(reply, 422, "invalid-request")["errors"][0]["pointer"] == "/headers/If-Match"
