"""How long after its deadline a round is closed by its quorum: `python -m benchmarks.quorum`.

Of 8 workers 2 never answer; the other 6 contribute at once and wait for the round. Printed, in milliseconds after the
deadline (the first contribution's time and `timeout`): when the step was made, as the history has it, and when the last
of the waiting workers had its reply. First with nothing else to do, then while 32 other clients take steps as fast as
they can, then with the replica killed that the contributions went to, so that another one has to see to it.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.running import Server, serving

WORKERS, QUORUM = 8, 6
TARGET = 100.0  # milliseconds
Lateness = tuple[float, float]  # of the step, and of the last reply


class Client:
    """One kept connection. Raises RuntimeError for a reply that is not 2xx."""

    def __init__(self, url: str) -> None:
        self._host = url.removeprefix("http://")
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def call(self, method: str, path: str, body: object = None, prefer: str = "") -> tuple[int, Any]:
        if self._streams is None:
            host, port = self._host.split(":")
            self._streams = await asyncio.open_connection(host, int(port))
        reader, writer = self._streams
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
        head += f"Prefer: {prefer}\r\n" if prefer else ""
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(answer.partition("\r\ncontent-length:")[2].partition("\r\n")[0])
        text = await reader.readexactly(length)
        status = int(answer.split(" ")[1])
        if status // 100 != 2:
            raise RuntimeError(f"{method} {path}: {status} {text.decode()}")
        return status, json.loads(text)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()


async def opened(url: str, seconds: float) -> str:
    """The path of a session of ours."""
    client = Client(url)
    aggregation = {"mode": "sync", "workers": WORKERS, "quorum": QUORUM, "timeout": seconds}
    body = {"optimizer": "adam", "params": {"w": [0.0] * 10}, "aggregation": aggregation}
    _, made = await client.call("POST", "/v1/sessions", body)
    client.close()
    return f"/v1/sessions/{made['id']}"


async def contribute(client: Client, session: str, worker: int, prefer: str = "") -> tuple[int, float]:
    """The status, and when it was there."""
    body = {"gradients": {"w": [float(worker)] * 10}, "worker": f"w{worker}", "return": "none"}
    status, _ = await client.call("POST", f"{session}/steps", body, prefer)
    return status, time.time()


async def deadline_of(client: Client, session: str) -> float:
    """Of the round that is open, in Unix seconds, once it has its quorum."""
    while True:
        _, shown = await client.call("GET", f"{session}/rounds/current")
        if shown["received"] >= QUORUM:
            return moment(shown["deadline"])
        await asyncio.sleep(0.005)


async def made_at(client: Client, session: str, step: int) -> float:
    """When the step was made, by the history; waits for it without making the service look at the session."""
    while True:
        _, found = await client.call("GET", f"{session}/history?after={step - 1}")
        if found["data"]:
            return moment(found["data"][0]["time"])
        await asyncio.sleep(0.005)


def moment(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


async def rounds(url: str, count: int, seconds: float) -> list[Lateness]:
    session = await opened(url, seconds)
    clients, observer = [Client(url) for _ in range(QUORUM)], Client(url)
    late: list[Lateness] = []
    for step in range(1, count + 1):
        waiting = [asyncio.create_task(contribute(c, session, i, "wait=60")) for i, c in enumerate(clients)]
        due = await deadline_of(observer, session)
        replies = await asyncio.gather(*waiting)
        if any(status != 200 for status, _ in replies):
            raise RuntimeError("a worker was not told of its round")
        made = await made_at(observer, session, step)
        late.append((1e3 * (made - due), 1e3 * (max(at for _, at in replies) - due)))
    for client in (*clients, observer):
        client.close()
    return late


async def after_a_kill(data: Path, other: Server, count: int, seconds: float) -> list[float]:
    """When the other replica closed rounds whose contributions went to one that was killed before the deadline."""
    late, observer = [], Client(other.url)
    for _ in range(count):
        killed = await asyncio.to_thread(Server(data).start)
        client = Client(killed.url)
        session = await opened(killed.url, seconds)
        for worker in range(QUORUM):
            await contribute(client, session, worker)
        due = await deadline_of(client, session)
        killed.kill()
        client.close()
        late.append(1e3 * (await made_at(observer, session, 1) - due))
    observer.close()
    return late


# -- what goes on beside it --------------------------------------------------------------------------------------------


async def step_for_ever(url: str, session: str) -> None:
    client = Client(url)
    while True:
        await client.call("POST", f"{session}/steps", {"gradients": {"w": [1.0] * 10}})


async def all_step(url: str, count: int) -> None:
    client = Client(url)
    body = {"optimizer": "adam", "params": {"w": [0.0] * 10}}
    made = [(await client.call("POST", "/v1/sessions", body))[1]["id"] for _ in range(count)]
    client.close()
    await asyncio.gather(*[step_for_ever(url, f"/v1/sessions/{id_}") for id_ in made])


def load(url: str, count: int) -> None:
    asyncio.run(all_step(url, count))


@contextlib.contextmanager
def stepping(url: str, count: int) -> Iterator[None]:
    """`count` clients, in a process of their own, each with a session of its own."""
    process = multiprocessing.get_context("spawn").Process(target=load, args=(url, count), daemon=True)
    process.start()
    time.sleep(2)  # until they are at work
    try:
        yield
    finally:
        if not process.is_alive():
            raise RuntimeError("the clients beside it stopped")
        process.terminate()
        process.join()


def told(case: str, figures: Sequence[float]) -> None:
    ordered = sorted(figures)
    share = sum(value <= TARGET for value in ordered) / len(ordered)
    print(
        f"{case:42} n {len(ordered):3}  least {ordered[0]:6.1f}  median {statistics.median(ordered):6.1f}  "
        f"90 % {ordered[int(0.9 * (len(ordered) - 1))]:6.1f}  greatest {ordered[-1]:6.1f} ms  "
        f"within {TARGET:g} ms: {100 * share:.0f} %",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--timeout", type=float, default=0.5, help="seconds")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "data"
        with serving(data) as server:
            for case, beside in (
                ("idle", contextlib.nullcontext()),
                (f"{given.clients} clients", stepping(server.url, given.clients)),
            ):
                with beside:
                    late = asyncio.run(rounds(server.url, given.rounds, given.timeout))
                told(f"{case}: the step was made", [step for step, _ in late])
                told(f"{case}: the last of {QUORUM} was told", [reply for _, reply in late])
            if given.kills:
                late_after = asyncio.run(after_a_kill(data, server, given.kills, max(given.timeout, 2.0)))
                told("replica killed: the step was made", late_after)


if __name__ == "__main__":
    main()
