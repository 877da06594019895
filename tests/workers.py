"""`ravine serve --workers N` as its user sees it from outside: who lives, who has what."""

import socket
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from service.workers.routing import home_of
from tests.running import Server
from tests.wire import create


def workers_of(pid: int) -> set[int]:
    """The process ids of the workers under a supervisor."""
    try:
        return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    except FileNotFoundError:
        return set()


def alive(pid: int) -> bool:
    """Whether it runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def by_worker(client: httpx.Client, name: str, **labels: str) -> dict[int, float]:
    """The samples called `name` with these labels, by the worker that told them."""
    return {
        int(sample.labels["worker"]): sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    }


def at_homes(client: httpx.Client, workers: int, **body: object) -> list[str]:
    """New sessions, one at home in each worker."""
    found: dict[int, str] = {}
    while len(found) < workers:
        session = create(client, **body)["id"]
        found.setdefault(home_of(session.encode(), workers), session)
    return [found[number] for number in range(workers)]


def landing_of(server: Server, number: int) -> tuple[int, str]:
    """The process id of worker `number`, and the path of the socket on which connections are handed over to it."""
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    found = {f"socket:[{line[6]}]": line[7] for line in lines if line[-1].endswith(f"/{number}.connections")}
    for pid in workers_of(server.pid):
        files = [str(file.readlink()) for file in Path(f"/proc/{pid}/fd").iterdir() if file.is_symlink()]
        for path in (found[file] for file in files if file in found):
            return pid, path
    raise AssertionError(f"nobody is worker {number}")


def takes(path: str) -> bool:
    """Whether anybody takes connections over there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
        try:
            link.connect(path)
        except (ConnectionError, FileNotFoundError):
            return False
        return True
