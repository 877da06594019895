"""How far apart many waiting clients hear of one step, through two replicas: `python -m benchmarks.long_poll`.

Half of the clients wait at one service process, half at another, both on one embedded store; the step is taken through
the first. Printed: how long after the step's own reply the first and the last client had theirs, and the spread.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from tests.running import Server, serving


async def request(server: Server, method: str, path: str, body: object = None) -> tuple[float, dict[str, object]]:
    """The moment at which the reply was there, and its JSON."""
    host, port = server.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    content = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    reply = await reader.read()
    moment = time.perf_counter()
    writer.close()
    status, _, rest = reply.partition(b"\r\n")
    if not status.split(b" ")[1].startswith(b"2"):
        raise RuntimeError(reply.decode())
    return moment, json.loads(rest.partition(b"\r\n\r\n")[2])


async def one_round(servers: list[Server], session: str, clients: int, step: int) -> tuple[float, float]:
    """Seconds from the step's own reply to the first and to the last client's."""
    path = f"/v1/sessions/{session}/params?after={step}&wait=30"
    waiting = [asyncio.create_task(request(servers[i % 2], "GET", path)) for i in range(clients)]
    await asyncio.sleep(1)
    done, _ = await request(servers[0], "POST", f"/v1/sessions/{session}/steps", {"gradients": {"w": [1.0] * 10}})
    moments = [moment for moment, reply in await asyncio.gather(*waiting) if reply["step"] == step + 1]
    if len(moments) != clients:
        raise RuntimeError("a client was told of another step")
    return min(moments) - done, max(moments) - done


async def measure(servers: list[Server], clients: int, rounds: int) -> None:
    _, made = await request(servers[0], "POST", "/v1/sessions", {"optimizer": "adam", "params": {"w": [0.0] * 10}})
    spreads = []
    for step in range(rounds):
        first, last = await one_round(servers, str(made["id"]), clients, step)
        spreads.append(last - first)
        print(f"first {first * 1e3:6.1f} ms  last {last * 1e3:6.1f} ms  spread {spreads[-1] * 1e3:6.1f} ms")
    print(f"{clients} clients, two replicas: median spread {statistics.median(spreads) * 1e3:.1f} ms, "
          f"greatest {max(spreads) * 1e3:.1f} ms")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        data = Path(directory) / "data"
        servers = [stack.enter_context(serving(data)) for _ in range(2)]
        asyncio.run(measure(servers, options.clients, options.rounds))


if __name__ == "__main__":
    main()
