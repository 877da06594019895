"""The record of each step."""

import csv
import io
import re

import httpx
import pytest

from tests.wire import create

FIELDS = ["step", "time", "loss", "grad_norm", "lr", "worker"]


@pytest.fixture
def stepped(client: httpx.Client) -> str:
    """Five steps under a schedule, some with a loss, one by a named worker."""
    lr = {"kind": "linear", "init": 1.0, "end": 0.5, "steps": 5}
    session: str = create(client, optimizer={"kind": "sgd", "lr": lr}, params={"w": [0.0, 0.0]})["id"]
    for t in range(1, 6):
        body = {"gradients": {"w": [3.0 * t, 4.0 * t]}} | ({"loss": 1 / t} if t % 2 else {})
        if t == 2:
            body["worker"] = "w-1.a_"
        assert client.post(f"/v1/sessions/{session}/steps", json=body).status_code == 200
    return session


def test_a_record_per_step(client: httpx.Client, stepped: str) -> None:
    reply = client.get(f"/v1/sessions/{stepped}/history")
    assert reply.status_code == 200
    assert reply.json()["has_more"] is False
    records = reply.json()["data"]
    assert all(list(record) == FIELDS for record in records)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    assert [record["loss"] for record in records] == [1.0, None, 1 / 3, None, 0.2]
    assert [record["grad_norm"] for record in records] == [5.0, 10.0, 15.0, 20.0, 25.0]
    assert [round(record["lr"], 12) for record in records] == [1.0, 0.9, 0.8, 0.7, 0.6]
    assert [record["worker"] for record in records] == [None, "w-1.a_", None, None, None]
    times = [record["time"] for record in records]
    assert times == sorted(times)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", time) for time in times)


def test_history_in_pages(client: httpx.Client, stepped: str) -> None:
    path = f"/v1/sessions/{stepped}/history"
    seen: list[int] = []
    url, more = f"{path}?limit=2", True
    while more:
        reply = client.get(url)
        seen += [record["step"] for record in reply.json()["data"]]
        more = reply.json()["has_more"]
        assert more == ("link" in reply.headers)
        if more:
            url = re.fullmatch('<(.*)>; rel="next"', reply.headers["link"])[1]  # type: ignore[index]
    assert seen == [1, 2, 3, 4, 5]
    after = client.get(path, params={"after": 3}).json()
    assert [record["step"] for record in after["data"]] == [4, 5]
    assert client.get(path, params={"after": 5}).json() == {"data": [], "has_more": False}
    assert client.get(path, params={"after": 2**53 - 1}).json() == {"data": [], "has_more": False}


def test_history_as_csv(client: httpx.Client, stepped: str) -> None:
    path = f"/v1/sessions/{stepped}/history"
    reply = client.get(path, headers={"Accept": "text/csv"}, params={"after": 1})
    assert reply.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(io.StringIO(reply.text, newline="")))
    records = client.get(path, params={"after": 1}).json()["data"]
    assert len(rows) == 4
    for row, record in zip(rows, records, strict=True):
        assert list(row) == FIELDS
        assert row == {name: "" if value is None else str(value) for name, value in record.items()}


def test_changes_that_are_no_steps_are_no_records(client: httpx.Client, stepped: str) -> None:
    path = f"/v1/sessions/{stepped}"
    client.patch(path, json={"name": "n"})
    client.put(f"{path}/params", json={"params": {"w": [0.0, 0.0]}})
    assert len(client.get(f"{path}/history").json()["data"]) == 5
    client.post(f"{path}/steps", json={"gradients": {"w": [0.0, 0.0]}})
    assert [record["step"] for record in client.get(f"{path}/history", params={"after": 4}).json()["data"]] == [5, 6]
