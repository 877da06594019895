"""What the process of a service takes, and whether it grows.

The first request of a kind brings in what stays: modules that are imported late, a pydantic model for the overrides of
each method, the catalogue, compiled expressions, connections to the store, the free memory that an allocator keeps. All
of that is bounded and there once. A service at work has it; so `before` is looked at after a warm-up that brings it
in, and not after the start. It touches every method by itself, and spends one turn as all later ones are. What grows
from then on grows for ever: a kilobyte kept of each request is 3 MB a turn, and 5 % are reached in the second.

Sessions are deleted after every turn, since whoever leaves them has asked for the memory that they take.
"""

import re
import time
from pathlib import Path
from typing import NamedTuple

from tests.running import Server

GROWTH = 0.05  # of what it was before


class Reading(NamedTuple):
    """`kib` of resident memory when `calls` were made, `minutes` after the warm-up."""

    what: str
    minutes: float
    calls: int
    kib: int


def rss(pid: int) -> int:
    """Resident memory, in KiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0])


def touch_every_kind(server: Server) -> None:
    """A session of each method, as far as its defaults make one, with a group of its own; and all that can be read."""
    with server.client() as client:
        for family in ("optimizers", "schedules", "transforms", "reducers"):
            for entry in client.get(f"/v1/{family}").json()["data"]:
                client.get(f"/v1/{family}/{entry['kind']}")
                if family == "optimizers":
                    body = {"optimizer": entry["kind"], "params": {"w": [[1.0, 2.0]]}, "groups": [{"match": "v"}]}
                    client.post("/v1/sessions", json=body)
        for base in ("sgd", "adamw"):  # the one method that has a base whose hyperparameters a group may set, too
            optimizer = {"kind": "schedule_free", "base": base}
            body = {"optimizer": optimizer, "params": {"w": [1.0]}, "groups": [{"match": "v"}]}
            client.post("/v1/sessions", json=body)
        for page in ("/openapi.json", "/docs", "/problems", "/metrics", "/readyz"):
            client.get(page)


def delete_sessions(server: Server) -> None:
    """Those that nobody deleted."""
    with server.client() as client:
        while sessions := client.get("/v1/sessions", params={"limit": 100}).json()["data"]:
            for session in sessions:
                client.delete(f"/v1/sessions/{session['id']}")


class Growth:
    """What `server` takes over time; `begin` once it is warm."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._since = time.monotonic()
        self.readings: list[Reading] = []
        self._read("at the start", 0)

    def _read(self, what: str, calls: int) -> None:
        minutes = (time.monotonic() - self._since) / 60
        self.readings.append(Reading(what, minutes, calls, rss(self._server.pid)))

    def begin(self) -> None:
        delete_sessions(self._server)
        self._since = time.monotonic()
        self._read("after the warm-up", 0)

    def look(self, calls: int) -> None:
        delete_sessions(self._server)
        self._read("after a turn", calls)

    @property
    def grown(self) -> float:
        """Since it was warm, as a share of what it was then."""
        before, after = self.readings[1], self.readings[-1]
        return after.kib / before.kib - 1

    def table(self, every: float = 5.0) -> str:
        """A line for the start, for the warm-up, for each `every` minutes, and for the end."""
        lines = [f"{'memory of the service':<24}{'minutes':>12}{'calls':>10}{'KiB':>10}"]
        due = 0.0
        for reading in self.readings:
            if reading.what != "after a turn" or reading.minutes >= due or reading is self.readings[-1]:
                lines.append(f"{reading.what:<24}{reading.minutes:>12.1f}{reading.calls:>10,}{reading.kib:>10,}")
            if reading.minutes >= due and reading.what == "after a turn":
                due = reading.minutes + every
        return "\n".join(lines)
