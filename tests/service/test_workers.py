"""What workers are made of: the sockets, the links between them, the texts that are put together."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.workers.berth import Berth
from service.workers.links import LARGEST, Landing, Link, Way
from service.workers.routing import home_of, session_in
from service.workers.scrape import Scrape
from service.workers.supervisor import bound

ID = "ses_0mws6qpw0zl2fo7k6hdm13hql"


# -- whose a request is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rest", ["", "/steps", "?x=1", "/params?after=3"])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "PATCH"])
def test_a_request_names_its_session(method: str, rest: str) -> None:
    assert session_in(f"{method} /v1/sessions/{ID}{rest} HTTP/1.1\r\nHost: x".encode()) == ID.encode()


@pytest.mark.parametrize(
    "beginning",
    [
        b"",
        b"POST /v1/sessions HTTP/1.1\r\n",
        b"GET /v1/sessions/ HTTP/1.1\r\n",
        f"GET /v1/sessions/{ID}".encode(),  # there may be more of it
        f"GET /v1/sessions/{ID[:12]}".encode(),
        f"GET /v1/sessions/{ID}\r\n".encode(),
        f"GET /v1/sessions/{ID.upper()} HTTP/1.1".encode(),
        f"GET /v1/sessions/%73{ID[1:]} HTTP/1.1".encode(),
        f"GET /other?/v1/sessions/{ID} HTTP/1.1".encode(),
        f"\r\nGET /v1/sessions/{ID} HTTP/1.1".encode(),
        b"\x16\x03\x01" + b"a" * 100,
        b"GET /v1/sessions/ses_" + b"a" * 1000 + b" HTTP/1.1",
    ],
)
def test_where_none_can_be_told(beginning: bytes) -> None:
    assert session_in(beginning) is None


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_homes_are_spread_and_stay(workers: int) -> None:
    ids = [f"ses_{i:025}".encode() for i in range(4000)]
    homes = [home_of(id_, workers) for id_ in ids]
    assert homes == [home_of(id_, workers) for id_ in ids]
    for number in range(workers):
        assert abs(homes.count(number) - 4000 / workers) < 4 * (4000 / workers) ** 0.5


# -- links -------------------------------------------------------------------------------------------------------------


class Pile:
    """Connections, and what was read of them."""

    def __init__(self) -> None:
        self.all: list[tuple[socket.socket, bytes]] = []

    def put(self, connection: socket.socket, data: bytes) -> None:
        self.all.append((connection, data))

    async def wait(self, count: int) -> None:
        async with asyncio.timeout(20):
            while len(self.all) < count:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.005)

    def close(self) -> None:
        for connection, _ in self.all:
            connection.close()


class Arrivals(Pile):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.landing = Landing(path, self.put)

    def close(self) -> None:
        self.landing.close()
        super().close()


def link_to(path: object) -> Link:
    """To one that takes everything."""
    return Link(str(path), Pile().put)


@pytest.mark.parametrize("size", [1, 60_000, 250 << 10])
def test_a_connection_and_its_bytes_arrive(tmp_path: Path, size: int) -> None:
    async def check() -> None:
        arrivals, link = Arrivals(str(tmp_path / "s")), link_to(tmp_path / "s")
        client, accepted = socket.socketpair()
        data = os.urandom(size)
        assert link.send(accepted.fileno(), data)
        accepted.close()
        await arrivals.wait(1)
        taken, told = arrivals.all[0]
        assert told == data
        taken.sendall(b"hello")
        assert client.recv(10) == b"hello"
        client.close()
        link.close()
        arrivals.close()

    asyncio.run(check())


def test_a_packet_that_is_too_long_stays_where_it_is(tmp_path: Path) -> None:
    async def check() -> None:
        arrivals, link = Arrivals(str(tmp_path / "s")), link_to(tmp_path / "s")
        ends = socket.socketpair()
        assert not link.send(ends[0].fileno(), bytes(8 << 20))
        assert link.send(ends[0].fileno(), b"x")  # and the link is none the worse
        await arrivals.wait(1)
        assert len(arrivals.all) == 1
        for end in ends:
            end.close()
        link.close()
        arrivals.close()

    asyncio.run(check())


def test_nobody_is_waited_for(tmp_path: Path) -> None:
    """One who is away, and one who takes nothing: the sender is told at once, and loses nothing."""

    async def check() -> None:
        path = str(tmp_path / "s")
        client, accepted = socket.socketpair()
        assert not link_to(path).send(accepted.fileno(), b"x")
        arrivals, link = Arrivals(path), link_to(path)
        sent = 0
        while link.send(accepted.fileno(), b"%d" % sent):  # this loop leaves the other no turn
            sent += 1
            assert sent < 100_000
        assert sent
        await arrivals.wait(sent)
        assert [data for _, data in arrivals.all] == [b"%d" % i for i in range(sent)]
        assert link.send(accepted.fileno(), b"again")
        await arrivals.wait(sent + 1)
        for end in (client, accepted):
            end.close()
        link.close()
        arrivals.close()

    asyncio.run(check())


def test_whoever_closes_takes_what_was_sent(tmp_path: Path) -> None:
    """Or the sender has it again: of a hundred connections none is lost, though they come while it closes."""

    async def check() -> None:
        path, back = str(tmp_path / "s"), Pile()
        arrivals, links = Arrivals(path), [Link(path, back.put) for _ in range(3)]
        client, accepted = socket.socketpair()
        assert all(link.send(accepted.fileno(), b"before") for link in links[:2])
        await arrivals.wait(2)
        # The way of one is not known there yet.
        assert all(link.send(accepted.fileno(), b"%d" % i) for i, link in enumerate(links * 20))
        arrivals.landing.close()
        assert all(link.send(accepted.fileno(), b"after") for link in links)  # for they cannot know yet
        assert len(arrivals.all) == 2 + 40
        await back.wait(20 + 3)
        assert not os.path.exists(path)  # noqa: ASYNC240 - at once
        assert not any(link.send(accepted.fileno(), b"no more") for link in links)
        again = Arrivals(path)
        await asyncio.sleep(0.1)  # longer than one who was away is let be
        assert links[0].send(accepted.fileno(), b"to the next")
        await again.wait(1)
        assert len(back.all) == 23
        for link in links:
            link.close()
        for end in (client, accepted):
            end.close()
        Pile.close(arrivals)
        for pile in (again, back):
            pile.close()

    asyncio.run(check())


def test_one_that_hangs_loses_what_it_was_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it sent more, until it says a word; then it is."""
    monkeypatch.setattr("service.workers.links.PATIENCE", 0.1)

    async def check() -> None:
        path, back = str(tmp_path / "s"), Pile()
        link = Link(path, back.put)
        client, accepted = socket.socketpair()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as hung:
            hung.bind(path)
            hung.listen()
            assert link.send(accepted.fileno(), b"first")
            assert link.send(accepted.fileno(), b"second")
            await back.wait(2)
            assert [data for _, data in back.all] == [b"first", b"second"]
            back.all[1][0].sendall(b"hello")
            assert client.recv(10) == b"hello"
            await asyncio.sleep(0.1)  # longer than one who was away is let be
            assert not link.send(accepted.fileno(), b"third")  # though there is room
            os.unlink(path)
        arrivals = Arrivals(path)
        async with asyncio.timeout(20):
            while not link.send(accepted.fileno(), b"fourth"):  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.02)
        await arrivals.wait(1)
        await asyncio.sleep(0.3)  # some times as long as it may hang
        assert link.send(accepted.fileno(), b"fifth")
        await arrivals.wait(2)
        assert len(back.all) == 2
        link.close()
        for end in (client, accepted):
            end.close()
        for pile in (arrivals, back):
            pile.close()

    asyncio.run(check())


def test_what_a_sender_left_is_taken(tmp_path: Path) -> None:
    """It is gone before the other one has looked."""

    async def check() -> None:
        path = str(tmp_path / "s")
        arrivals = Arrivals(path)
        client, accepted = socket.socketpair()
        way = Way(path)
        socket.send_fds(way.out, [b"last words"], [accepted.fileno()])
        way.close()  # as the kernel does for one that is killed: nothing is taken back
        await arrivals.wait(1)
        assert arrivals.all[0][1] == b"last words"
        for end in (client, accepted):
            end.close()
        arrivals.close()

    asyncio.run(check())


def open_files_here() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_files_that_are_open_for_links(tmp_path: Path) -> None:
    """Or connections that are let in would find none."""

    async def check() -> None:
        path = str(tmp_path / "s")
        arrivals, link = Arrivals(path), link_to(path)
        before = open_files_here()
        with socket.socket() as connection:
            assert link.send(connection.fileno(), b"x")
        await arrivals.wait(1)
        Pile.close(arrivals)
        assert open_files_here() - before == Berth(0, 2, tmp_path, -1, -1).files
        link.close()
        arrivals.close()

    asyncio.run(check())


def test_links_leave_no_files_open(tmp_path: Path) -> None:
    async def check() -> None:
        path, back = str(tmp_path / "s"), Pile()
        client, accepted = socket.socketpair()
        counts: list[int] = []
        for _ in range(4):
            arrivals, link = Arrivals(path), Link(path, back.put)
            assert link.send(accepted.fileno(), b"x")
            await arrivals.wait(1)
            assert link.send(accepted.fileno(), b"y")
            assert not arrivals.all[0][0].get_inheritable()
            arrivals.close()
            assert link.send(accepted.fileno(), b"z")
            link.close()
            assert len(back.all) == 1 + len(counts)
            back.close()
            counts.append(open_files_here())
        assert counts[1:] == counts[:-1]
        for end in (client, accepted):
            end.close()

    asyncio.run(check())


def test_what_uvloop_reads_at_once_fits() -> None:
    assert LARGEST > 256_000


# -- the port ----------------------------------------------------------------------------------------------------------


def test_all_addresses_have_one_port() -> None:
    sockets = bound("localhost", 0)
    try:
        assert len({each.getsockname()[1] for each in sockets}) == 1
        sockets[0].listen()
        with pytest.raises(OSError, match="in use"):
            bound(*sockets[0].getsockname()[:2])
    finally:
        for each in sockets:
            each.close()


# -- metrics -----------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def scrapes(directory: Path, texts: list[str | None]) -> AsyncIterator[list[Scrape]]:
    """One for each text; None: it never answers."""

    def telling(text: str | None) -> object:
        async def write(_: str) -> tuple[bytes, str]:
            if text is None:
                await asyncio.sleep(60)
            return str(text).encode(), "text/plain"

        return write

    made = [
        Scrape(Berth(number, len(texts), directory, -1, -1), telling(text))  # type: ignore[arg-type]
        for number, text in enumerate(texts)
    ]
    for scrape in made:
        await scrape.open()
    yield made
    for scrape in made:
        await scrape.close()


def text_of(number: int, *families: str) -> str:
    lines = [f'# HELP {name} Some.\n# TYPE {name} gauge\n{name}{{worker="{number}"}} {number}.0\n' for name in families]
    return "".join(lines)


def test_the_texts_of_all_are_one(tmp_path: Path) -> None:
    """A family that one of them alone has, and one in another place, included; and one of them is away."""
    texts = [text_of(0, "a", "b"), text_of(1, "b", "c", "a"), None]

    async def check() -> str:
        async with scrapes(tmp_path, texts) as made:
            await made[2].close()
            return (await made[0].text(""))[0].decode()

    text = asyncio.run(check())
    found = {
        family.name: {sample.labels["worker"]: sample.value for sample in family.samples}
        for family in text_string_to_metric_families(text)
    }
    assert found == {
        "a": {"0": 0, "1": 1},
        "b": {"0": 0, "1": 1},
        "c": {"1": 1},
        "ravine_worker_up": {"0": 1, "1": 1, "2": 0},
    }
    assert text.count("# TYPE a gauge") == 1


def test_one_that_hangs_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.workers.scrape.PATIENCE", 0.2)

    async def check() -> str:
        async with scrapes(tmp_path, [text_of(0, "a"), None]) as made:
            return (await made[0].text(""))[0].decode()

    assert 'ravine_worker_up{worker="1"} 0.0' in asyncio.run(check())


def test_half_of_what_one_told_is_left_out(tmp_path: Path) -> None:
    """It died while it wrote. A line of which there is half would make Prometheus refuse all."""

    async def check() -> str:
        async with scrapes(tmp_path, [text_of(0, "a"), text_of(1, *(f"b{i}" for i in range(9)))]) as made:
            path = Berth(1, 2, tmp_path, -1, -1).metrics(1)
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(b"\n")
            whole = await reader.read()
            writer.close()
            await made[1].close()

            async def tell(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                writer.write(whole[: 2 * len(whole) // 3])
                writer.close()

            dying = await asyncio.start_unix_server(tell, path)
            text = (await made[0].text(""))[0].decode()
            dying.close()
            return text

    text = asyncio.run(check())
    assert 'ravine_worker_up{worker="1"} 0.0' in text
    assert {family.name for family in text_string_to_metric_families(text)} == {"a", "ravine_worker_up"}
