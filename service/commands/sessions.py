"""`ravine sessions`: what the store has of a session, and letting one go on whose store went back."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

import typer

from service.commands.opened import Refused, opened, run
from service.commands.options import Data, RedisUrl, settings_of
from service.errors import Corrupt, SessionNotFound, StoreUnavailable, UnknownFormat
from service.ids import checked_id
from service.index import DEFAULT_TENANT
from service.inspection import described, inspect
from service.records import Head, state_lost
from service.settings import Settings
from service.store import Store

cli = typer.Typer(
    name="sessions", help="Look at sessions in the store; accept what is left of one.", no_args_is_help=True
)

PAGE = 1000
# Seconds in which no service told of more that was lost: each looks soon after it meets another store. One that saw
# more and is cut off tells of it later, and that is accepted by itself.
QUIET = 1.0
Id = Annotated[str, typer.Argument(help="The session's id.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]


@cli.command("list")
def list_(
    tenant: Annotated[
        str | None, typer.Option(help="Whose sessions: those of `default`, with --lost of all.", show_default=False)
    ] = None,
    lost: Annotated[bool, typer.Option("--lost", help="Those alone whose store lost steps.")] = False,
    as_json: Json = False,
    redis_url: RedisUrl = None,
    data: Data = None,
) -> None:
    """List sessions: where they stand, and which have lost steps."""
    run(_list(settings_of(redis_url=redis_url, data=data), tenant, lost=lost, as_json=as_json))


@cli.command("inspect")
def inspect_(id_: Id, as_json: Json = False, redis_url: RedisUrl = None, data: Data = None) -> None:
    """Show where a session stands, what it has lost, its snapshot and its log."""
    found = run(_inspect(settings_of(redis_url=redis_url, data=data), id_))
    typer.echo(json.dumps(found, indent=2) if as_json else "\n".join(_lines(found)))


@cli.command()
def accept(
    id_: Id,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    redis_url: RedisUrl = None,
    data: Data = None,
) -> None:
    """Let a session go on from where the store has it, and give up the steps that the store lost."""
    run(_accept(settings_of(redis_url=redis_url, data=data), id_, yes=yes))


async def _list(settings: Settings, tenant: str | None, *, lost: bool, as_json: bool) -> None:
    async with opened(settings, make=False) as store:
        everybody = await store.index.tenants() if lost else [DEFAULT_TENANT]
        for name in everybody if tenant is None else [tenant]:
            async for shown in _listed(store, name, lost=lost):
                typer.echo(json.dumps(shown) if as_json else _line(shown))


async def _listed(store: Store, tenant: str, *, lost: bool) -> AsyncIterator[dict[str, Any]]:
    after: str | None = None
    while ids := await store.index.ids(tenant, None, after, PAGE):
        for id_, head in zip(ids, await store.heads(ids), strict=True):
            if isinstance(head, Corrupt):  # with --lost, too: nobody can tell whether it is
                yield {"id": id_, "tenant": tenant, "damaged": str(head)}
            elif isinstance(head, UnknownFormat):
                if not lost:
                    yield {"id": id_, "format": head.format}
            elif head is not None and (head.lost is not None or not lost):
                stands = {"step": head.step, "updated_at": head.updated_at, "lost": head.lost is not None}
                yield {"id": id_, "tenant": tenant, **stands}
        after = ids[-1]


def _line(found: dict[str, Any]) -> str:
    if "format" in found:
        return f"{found['id']}  of format {found['format']}, which this release does not read"
    whose = "" if found["tenant"] == DEFAULT_TENANT else f"  of tenant {found['tenant']}"
    if "damaged" in found:
        return f"{found['id']}{whose}  damaged: {found['damaged']}"
    lost = "  lost steps" if found["lost"] else ""
    return f"{found['id']}{whose}  step {found['step']}  changed {found['updated_at']}{lost}"


async def _inspect(settings: Settings, id_: str) -> dict[str, Any]:
    async with opened(settings, make=False) as store:
        try:
            found = await inspect(store, checked_id(id_))
            if found is None:
                raise SessionNotFound(id_)
            return described(id_, found)
        except Corrupt as fault:  # so that nothing can be shown
            raise Refused(f"{id_} is damaged: {fault}") from None


def _lines(found: dict[str, Any]) -> list[str]:
    stands, snapshot, lost = found["stands"], found["snapshot"], found["lost"]
    lines = [
        f"{found['id']} of tenant {found['tenant']}, changed {found['updated_at']}",
        f"stands at   step {stands['step']}, ETag {stands['etag']}, entry {stands['seq']}",
    ]
    if lost is not None:
        lines += [
            f"was seen at step {lost['step']}, ETag {lost['etag']}, entry {lost['seq']}, "
            f"which the store does not have (found {lost['at']})",
            f"            all calls but DELETE are refused until: ravine sessions accept {found['id']}",
        ]
    if found["epoch"]:
        lines.append(f"accepted    {found['epoch']} times before")
    checks = "its checksum agrees" if snapshot["ok"] else "NOT READABLE"
    if found["log"] is None:
        checks = "not looked at"
    lines.append(f"snapshot    {snapshot['name']}: entry {snapshot['seq']}, {snapshot['bytes']} bytes, {checks}")
    if found["fault"] is not None:
        lines.append(f"fault       {found['fault']}")
    for entry in found["log"] or ():
        step = "?" if entry["step"] is None else entry["step"]
        lines.append(
            f"entry {entry['seq']:<8}  {entry['time']}  {entry['kind']:<8}  step {step}, {entry['bytes']} bytes, "
            f"commit {entry['commit']}"
        )
    return lines


async def _accept(settings: Settings, id_: str, *, yes: bool) -> None:
    async with opened(settings, make=False) as store:
        head = await _all_told(store, checked_id(id_))
        if not yes:
            typer.confirm(f"Go on from step {head.step}?", abort=True)
        if await store.accept(id_, head) != "OK":
            raise StoreUnavailable(f"{id_} was changed by somebody else meanwhile: nothing was accepted, look again")
    typer.echo(f"{id_} goes on from step {head.step}")


async def _all_told(store: Store, id_: str) -> Head:
    """The head of a lost session, once no service has more to tell, which it says. Raises SessionNotFound, Refused."""
    head, before = await store.head(id_), None
    while head is not None and head.lost is not None and head.lost != before:
        before = head.lost
        await asyncio.sleep(QUIET)
        head = await store.head(id_)
    if head is None:
        raise SessionNotFound(id_)
    if head.lost is None:
        raise Refused(f"{id_} has lost nothing: it stands at step {head.step}")
    error = state_lost(id_, head)
    typer.echo(
        f"{id_} was seen at step {error.acknowledged.step}, ETag {error.acknowledged.etag}, entry {head.lost.seq}.\n"
        f"The store has it at step {error.found.step}, ETag {error.found.etag}, entry {head.seq}.\n"
        "What lies between, or beside that, is given up; the idempotency keys of those steps are forgotten with them."
    )
    return head
