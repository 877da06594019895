"""`ravine backup` and `ravine restore`: all that the embedded store holds, as one file.

The server writes a dump, the state of one moment, beside whatever it is doing; steps go on meanwhile. The dump is
copied, synced, and read from end to end by the server's own checker, by its checksum, before the copy takes the name
that was asked for: a file of that name is whole, however the command was broken off. It is taken back into an empty
directory alone, so that a restore never destroys anything; the service that is started there then loads it.

In a directory that keeps a log, the dump is in nobody's way but takes as much disk again. It is removed, under the
lock under which a service switches from the log to dumps: the dump could otherwise have become the only copy.
"""

import asyncio
import contextlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from redis.exceptions import ResponseError

from service.commands.opened import opened
from service.commands.opened import run as run_
from service.commands.options import Data, settings_of
from service.errors import StoreUnavailable
from service.settings import Settings
from service.store import Store
from service.valkey import DIRECTIVES, LOG_DIRECTORY, EmbeddedFailed, find_binary, try_lock

DUMP = DIRECTIVES["dbfilename"]
# What may lie in a directory that holds no sessions: what servers leave there beside their data.
_HARMLESS = {"valkey.lock", "valkey.alive", "valkey.pid", "valkey.sock", "valkey.log", "valkey.log.1"}


class BackupFailed(EmbeddedFailed):
    """No file was made, or none was taken back; says why."""


File = Annotated[Path, typer.Argument(help="The file of the backup.", show_default=False)]


def backup(file: File, data: Data = None) -> None:
    """Write all sessions and keys of the embedded store into FILE, while the service goes on.

    FILE must not be there yet. It is one moment's state, checked after it was written, and readable by its owner alone.
    """
    settings = settings_of(data=data)
    if settings.redis_url:
        typer.echo(
            "ravine: that is the store's own business where it is a Redis of yours: docs/operations.md", err=True
        )
        raise typer.Exit(2)
    if os.path.lexists(file):
        typer.echo(f"ravine: {file} is there already: a backup replaces nothing", err=True)
        raise typer.Exit(2)
    run_(_backup(file, settings))
    typer.echo(f"{file}: {file.stat().st_size} bytes, read back and whole")


def restore(file: File, data: Data = None) -> None:
    """Put the backup in FILE into a data directory that holds no sessions; `ravine serve` then starts from it."""
    directory = settings_of(data=data).data.expanduser().resolve()
    run_(asyncio.to_thread(_restore, file, directory))
    typer.echo(f"{directory} holds what was in {file}: start it with ravine serve --data {directory}")


async def _backup(file: Path, settings: Settings) -> None:
    # A name that nobody can have put anything in the way of: the directory may be one that others write into.
    partial = file.with_name(f"{file.name}.{secrets.token_hex(8)}.partial")
    directory = settings.data.expanduser().resolve()
    async with opened(settings, make=False) as store:
        await _dump(store)
        try:
            await asyncio.to_thread(_copy, directory / DUMP, partial)
            await asyncio.to_thread(check, partial)
            _name(partial, file)
            _sync(file.parent)
        finally:
            partial.unlink(missing_ok=True)
            with contextlib.suppress(StoreUnavailable):  # it lies there for the next time, then
                await _tidy(store, directory)


async def _dump(store: Store) -> None:
    """Returns once the server has written a dump that it began after this was called."""
    before = int((await store.link.call("TIME"))[0])
    while True:
        await _idle(store)
        try:
            await store.link.call("BGSAVE")
            break
        except ResponseError as refusal:
            if "progress" not in str(refusal):
                raise BackupFailed(f"the store writes no dump: {refusal}") from None
    info = await _idle(store)
    if info["rdb_last_bgsave_status"] != "ok" or int(info["rdb_last_save_time"]) < before:
        raise BackupFailed("the store could not write its dump: is the disk full? Its own words are in valkey.log")


async def _idle(store: Store) -> dict[str, str]:
    """INFO of the persistence, once the server has no child that writes a dump or a log."""
    while True:
        lines = (await store.link.call("INFO", "persistence")).decode().splitlines()
        info = dict(line.split(":", 1) for line in lines if ":" in line)
        if info["rdb_bgsave_in_progress"] == info["aof_rewrite_in_progress"] == "0":
            return info
        await asyncio.sleep(0.05)


async def _tidy(store: Store, directory: Path) -> None:
    with _locked(directory / "valkey.lock") as free:
        settings = await store.link.call("CONFIG", "GET", "appendonly")
        manifest = directory / LOG_DIRECTORY / f"{DIRECTIVES['appendfilename']}.manifest"
        if free and settings[1] == b"yes" and manifest.exists():
            (directory / DUMP).unlink(missing_ok=True)


def _restore(file: Path, directory: Path) -> None:
    check(file)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    held = sorted({path.name for path in directory.iterdir()} - _HARMLESS)
    if held:
        raise BackupFailed(f"{directory} is not empty, it holds {', '.join(held[:4])}: name a new directory")
    directory.chmod(0o700)
    with _locked(directory / "valkey.lock") as idle, _locked(directory / "valkey.alive") as dead:
        if not (idle and dead):
            raise BackupFailed(f"a service works on {directory}: stop it, or name another directory")
        # Whoever starts a server here removes what is called temp-…
        partial = directory / f"temp-{secrets.token_hex(8)}.rdb"
        _copy(file, partial)
        check(partial)
        partial.rename(directory / DUMP)
        _sync(directory)


def check(file: Path) -> None:
    """Raises BackupFailed for what is not a whole dump that this server can read, OSError for what cannot be read."""
    with file.open("rb"):
        binary = find_binary()
    # The servers are their own checkers, under another name.
    name = "redis-check-rdb" if "redis" in binary.name else "valkey-check-rdb"
    done = subprocess.run(
        [name, str(file)], executable=binary, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        raise BackupFailed("\n".join([f"{file} is not a whole dump:", *done.stdout.splitlines()[-8:]]))


def _copy(source: Path, target: Path) -> None:
    """The bytes, on the disk, in a file that was not there; the source may be replaced under its name meanwhile."""
    private = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with source.open("rb") as reading, os.fdopen(private, "wb") as writing:
        shutil.copyfileobj(reading, writing, 1 << 20)
        writing.flush()
        os.fsync(writing.fileno())


def _name(partial: Path, file: Path) -> None:
    """Gives the file its name. Raises BackupFailed where something has it by now: a link replaces nothing."""
    taken = f"{file} is there already: a backup replaces nothing"
    try:
        os.link(partial, file, follow_symlinks=False)
    except FileExistsError:
        raise BackupFailed(taken) from None
    except OSError:  # a file system without links, such as FAT
        if os.path.lexists(file):
            raise BackupFailed(taken) from None
        partial.rename(file)


def _sync(directory: Path) -> None:
    opened_ = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(opened_)
    finally:
        os.close(opened_)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether nobody else holds the lock; it is held meanwhile."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        yield try_lock(file)
    finally:
        os.close(file)
