"""`ravine keys`: who is let in. Keys are made, listed and revoked in the store, whether a service runs or not."""

import json
import re
import time
from datetime import UTC, datetime
from typing import Annotated, Final

import typer

from service.access.keys import Key, new_key
from service.access.rates import parse_rate
from service.access.rights import SCOPES, Scope
from service.commands.opened import opened, run
from service.commands.options import Data, RedisUrl, settings_of
from service.errors import SessionNotFound, Unconfirmed
from service.ids import checked_id
from service.index import DEFAULT_TENANT
from service.settings import Settings

cli = typer.Typer(name="keys", help="Make, list and revoke the keys that let requests in.", no_args_is_help=True)

# It becomes part of names in the store, and of lines for people.
_TENANT: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_SPAN: Final = re.compile(r"([1-9][0-9]{0,5})([smhdw])")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_ID: Final = re.compile(r"(?:rvn_)?([a-z0-9]{12,32})(?:_[A-Za-z0-9_-]*)?")
MAX_NAME: Final = 200


@cli.command()
def create(
    scope: Annotated[str, typer.Option(help="admin, session or worker.", show_default=False)],
    tenant: Annotated[str, typer.Option(help="Whose sessions it is for.")] = DEFAULT_TENANT,
    session: Annotated[str | None, typer.Option(help="The one session of a worker's key.", show_default=False)] = None,
    expires: Annotated[
        str | None,
        typer.Option(help="After so long (90m, 12h, 30d, 4w) or on a day (2027-01-01), UTC. [default: never]"),
    ] = None,
    rate: Annotated[
        str | None, typer.Option(help="Requests that it may make, such as 100/second. [default: the tenant's]")
    ] = None,
    name: Annotated[str, typer.Option(help="What it is for, for people.", show_default=False)] = "",
    redis_url: RedisUrl = None,
    data: Data = None,
) -> None:
    """Make a key. It is printed once, and is nowhere to be read again."""
    settings = settings_of(redis_url=redis_url, data=data)
    text, key = new_key(
        _tenant(tenant),
        _scope(scope, session),
        session=session,
        rate=_rate(rate),
        name=_name(name),
        expires_at=_expires(expires, time.time()),
    )
    run(_create(settings, key))
    until = "" if key.expires_at is None else f", until {_moment(key.expires_at)}"
    typer.echo(f"ravine: key {key.id}: {key.scope} of tenant {key.tenant}{until}; it is not shown again:", err=True)
    typer.echo(text)


async def _create(settings: Settings, key: Key) -> None:
    async with opened(settings, vouched=True) as store:
        if key.session is not None:
            head = await store.head(key.session)
            if head is None or head.tenant != key.tenant:
                raise SessionNotFound(key.session)
        try:
            await store.keyring.add(key)
        except Unconfirmed as error:
            raise Unconfirmed(
                f"key {key.id} is made, if at all, but not confirmed: {error}. It is not shown, and opens nothing; run "
                "it again for another one"
            ) from None


@cli.command("list")
def list_(
    json_: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    redis_url: RedisUrl = None,
    data: Data = None,
) -> None:
    """List the keys, oldest first. Their secrets are not kept, so none are shown."""
    keys = run(_all(settings_of(redis_url=redis_url, data=data)))
    if json_:
        typer.echo(json.dumps([_shown(key) for key in keys], indent=2))
        return
    header = ("ID", "TENANT", "SCOPE", "SESSION", "CREATED", "EXPIRES", "RATE", "NAME")
    rows = [header, *map(_row, keys)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


async def _all(settings: Settings) -> list[Key]:
    async with opened(settings, make=False) as store:
        return await store.keyring.all()


@cli.command()
def revoke(
    key: Annotated[str, typer.Argument(help="The id of the key, as `keys list` shows it.", show_default=False)],
    redis_url: RedisUrl = None,
    data: Data = None,
) -> None:
    """End a key. Services on the store refuse it within a second."""
    found = _ID.fullmatch(key)
    if found is None:
        raise typer.BadParameter("an id is 12 or more of a-z and 0-9", param_hint="KEY")
    if not run(_revoke(settings_of(redis_url=redis_url, data=data), found[1])):
        typer.echo(f"ravine: there is no key {found[1]}", err=True)
        raise typer.Exit(1)
    typer.echo(f"ravine: key {found[1]} is revoked", err=True)


async def _revoke(settings: Settings, id_: str) -> bool:
    async with opened(settings, make=False, vouched=True) as store:
        try:
            return await store.keyring.revoke(id_)
        except Unconfirmed as error:
            raise Unconfirmed(
                f"key {id_} is revoked here, but that is not confirmed: {error}. Nothing is taken back, and a failover "
                "or a power cut may bring the key back: run it again"
            ) from None


# -- what is given -----------------------------------------------------------------------------------------------------


def _scope(text: str, session: str | None) -> Scope:
    scope = next((scope for scope in SCOPES if scope == text), None)
    if scope is None:
        raise typer.BadParameter(f"must be one of {', '.join(SCOPES)}", param_hint="--scope")
    if (scope == "worker") != (session is not None):
        raise typer.BadParameter("a worker's key is for one session, other keys are for all", param_hint="--session")
    if session is not None:
        try:
            checked_id(session)
        except SessionNotFound as error:
            raise typer.BadParameter(str(error), param_hint="--session") from None
    return scope


def _tenant(text: str) -> str:
    if not _TENANT.fullmatch(text):
        raise typer.BadParameter("1 to 64 of a-z 0-9 . _ -, the first a letter or a digit", param_hint="--tenant")
    return text


def _name(text: str) -> str:
    if len(text) > MAX_NAME or not text.isprintable():
        raise typer.BadParameter(f"at most {MAX_NAME} printable characters", param_hint="--name")
    return text


def _rate(text: str | None) -> str | None:
    if text is not None:
        try:
            parse_rate(text)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--rate") from None
    return text


def _expires(text: str | None, now: float) -> int | None:
    """In Unix seconds."""
    if text is None:
        return None
    span = _SPAN.fullmatch(text)
    try:
        at = now + int(span[1]) * _SECONDS[span[2]] if span else _day(text)
        datetime.fromtimestamp(at, UTC)
    except (ValueError, OverflowError):
        raise typer.BadParameter(
            "a time from now such as 90m, 12h, 30d or 4w, or a day such as 2027-01-01", param_hint="--expires"
        ) from None
    if at <= now:
        raise typer.BadParameter("that is over already", param_hint="--expires")
    return int(at)


def _day(text: str) -> float:
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


# -- what is shown -----------------------------------------------------------------------------------------------------


def _moment(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _shown(key: Key) -> dict[str, str | bool | None]:
    """A key for programs: all but its digest."""
    expires = None if key.expires_at is None else _moment(key.expires_at)
    shown = {name: value for name, value in key._asdict().items() if name != "digest"}
    return {**shown, "created_at": _moment(key.created_at), "expires_at": expires, "expired": key.expired}


def _row(key: Key) -> tuple[str, ...]:
    expires = "never" if key.expires_at is None else _moment(key.expires_at) + " (over)" * key.expired
    session = key.session or "all"
    return key.id, key.tenant, key.scope, session, _moment(key.created_at), expires, key.rate or "-", key.name
