"""The store from the command line: the same one that the service uses, whether a service runs or not.

A Redis of one's own is connected to. The embedded store is attached to where it runs, and started where it does not;
in the end it is shut down in good order, unless others are connected to it. So a command leaves no server behind, ends
none that a service uses, and one that a service has let go of in the meantime is ended by the command.

How durable the embedded store is stays as it is: the last one to attach decides that, and a command has no say in it.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import typer
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeout

from service import logs
from service.acks import AckImpossible, Asked
from service.embedded import Durability, Embedded
from service.errors import ServiceError, StoreUnavailable
from service.settings import Settings
from service.store import MEMORY, Store
from service.valkey import LOG_DIRECTORY, EmbeddedFailed, socket_path

T = TypeVar("T")


class Refused(Exception):
    """What a command does not do, in a sentence."""


@contextlib.asynccontextmanager
async def opened(settings: Settings, *, make: bool = True, vouched: bool = False) -> AsyncIterator[Store]:
    """The store of a service with these settings. Not `make`: an embedded store that was never used stays unmade.
    `vouched`: what is durable is waited for as the settings say, and raises Unconfirmed.

    Raises StoreUnavailable, EmbeddedFailed, OSError.
    """
    asked = Asked(settings.ack, settings.ack_replicas) if vouched else MEMORY
    if settings.redis_url:
        async with _connected(settings.redis_url, asked) as store:
            yield store
        return
    data = settings.data.expanduser().resolve()
    if not make and not (data / "valkey.lock").exists():
        raise StoreUnavailable(f"there is no store in {data}: name the directory that the service uses with --data")
    embedded = Embedded(data, await _durability(data, settings), on_progress=_tell)
    await embedded.start()
    try:
        async with _connected(embedded.url, asked) as store:
            yield store
    finally:
        await embedded.stop()


@contextlib.asynccontextmanager
async def _connected(url: str, asked: Asked) -> AsyncIterator[Store]:
    store = Store(url, asked=asked)
    try:
        # One that cannot vouch for anything just now is open all the same, and says so at each change: a key must be
        # revoked even while no replica answers.
        with contextlib.suppress(AckImpossible):
            await store.open()
        yield store
    finally:
        await store.close()


async def _durability(data: Path, settings: Settings) -> Durability:
    """What the server is set to that runs in `data`; else what lies on the disk there, and what was asked for."""
    client = Redis(unix_socket_path=str(socket_path(data)), socket_timeout=2.0, retry=Retry(NoBackoff(), 0))
    try:
        now = await client.config_get("appendonly", "appendfsync")
    except RedisTimeout as error:
        raise StoreUnavailable(f"the store in {data} does not answer: {error}") from None
    except (RedisError, OSError):  # it does not run
        if settings.ack == "disk" or (data / LOG_DIRECTORY / "appendonly.aof.manifest").exists():
            return "always"  # a log stays a log, and what a command changes is on the disk when it ends
        return "snapshot" if (data / "dump.rdb").exists() else settings.durability or "everysec"
    finally:
        await client.aclose()
    if _text(now, "appendonly") == "no":
        return "snapshot"
    return "always" if _text(now, "appendfsync") == "always" else "everysec"


def _text(found: dict[Any, Any], name: str) -> str:
    value = found.get(name, found.get(name.encode(), b""))
    return value.decode() if isinstance(value, bytes) else str(value)


def _tell(sentence: str) -> None:
    typer.echo(f"ravine: {sentence}", err=True)


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs a command to its end; a sentence and exit code 1 where the store does not allow what is asked of it."""
    logs.configure("text")  # to the standard error: what a command prints may go into a file
    try:
        return asyncio.run(coroutine)
    except (Refused, ServiceError, EmbeddedFailed, OSError) as error:
        typer.echo(f"ravine: {error}", err=True)
        raise typer.Exit(1) from None
