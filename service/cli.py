"""`ravine serve`: the service on a port."""

import ssl
from pathlib import Path
from typing import Annotated, Any

import typer

from service import __version__, listing, logs, memory, serving
from service.commands import backup
from service.commands import keys as keys_command
from service.commands import sessions as sessions_command
from service.commands.options import option as _option
from service.commands.options import settings_of
from service.settings import Settings
from service.workers import supervisor

cli = typer.Typer(
    name="ravine",
    help="Ravine: optimization as a service. Open an optimizer session over HTTP, post gradients, get updates back.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"ravine {__version__}")
        raise typer.Exit


Version = typer.Option("--version", callback=_version, is_eager=True, help="The version, and no more.")


cli.add_typer(keys_command.cli)
cli.add_typer(sessions_command.cli)


@cli.callback()
def _root(_: Annotated[bool, Version] = False) -> None:
    """Ravine: optimization as a service."""


@cli.command()
def serve(
    host: Annotated[str | None, _option("host")] = None,
    port: Annotated[int | None, _option("port")] = None,
    tls_cert: Annotated[Path | None, _option("tls_cert")] = None,
    tls_key: Annotated[Path | None, _option("tls_key")] = None,
    keys: Annotated[str | None, _option("keys")] = None,
    insecure: Annotated[bool | None, _option("insecure", "--insecure")] = None,
    data: Annotated[Path | None, _option("data")] = None,
    redis_url: Annotated[str | None, _option("redis_url")] = None,
    workers: Annotated[int | None, _option("workers")] = None,
    ack: Annotated[str | None, _option("ack")] = None,
    ack_replicas: Annotated[int | None, _option("ack_replicas")] = None,
    durability: Annotated[str | None, _option("durability")] = None,
    memory_: Annotated[str | None, _option("memory")] = None,
    log_format: Annotated[str | None, _option("log_format")] = None,
) -> None:
    """Run the service until it is told to stop (Ctrl-C or SIGTERM).

    With no options it listens on http://127.0.0.1:8000 and keeps its sessions in ./ravine-data, by a private Valkey
    that it starts itself. Stop it and start it again: every session goes on where it stood. All options can also be
    given as environment variables; docs/settings.md lists them all.
    """
    given: dict[str, Any] = {
        "host": host,
        "port": port,
        "tls_cert": tls_cert,
        "tls_key": tls_key,
        "keys": keys,
        "insecure": insecure,
        "data": data,
        "redis_url": redis_url,
        "workers": workers,
        "ack": ack,
        "ack_replicas": ack_replicas,
        "durability": durability,
        "memory": memory_,
        "log_format": log_format,
    }
    settings = settings_of(**given)
    _check_tls(settings)
    logs.configure(settings.log_format)
    memory.return_large_arrays()
    raise typer.Exit(serving.run(settings) if settings.workers == 1 else supervisor.run(settings))


def _check_tls(settings: Settings) -> None:
    """Ends the command where certificate and key cannot be used, rather than with a traceback once it would listen."""
    if settings.tls_cert is None:
        return
    try:
        # uvicorn gives no password: asked for one, OpenSSL would wait at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls_cert, settings.tls_key, password="")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        typer.echo(f"ravine: tls_cert, tls_key: cannot be used: {error}", err=True)
        raise typer.Exit(2) from None


cli.command()(backup.backup)
cli.command()(backup.restore)

Kind = Annotated[str | None, typer.Argument(help="The name of a kind.", show_default=False)]
Markdown = Annotated[bool, typer.Option("--markdown", help="All of them, as the page in docs/.")]


@cli.command()
def optimizers(kind: Kind = None, markdown: Markdown = False) -> None:
    """List the optimizers, or tell all about one: ravine optimizers adam."""
    _tell("optimizers", kind, markdown=markdown)


@cli.command()
def schedules(kind: Kind = None, markdown: Markdown = False) -> None:
    """List the schedules of hyperparameters, or tell all about one."""
    _tell("schedules", kind, markdown=markdown)


@cli.command()
def transforms(kind: Kind = None, markdown: Markdown = False) -> None:
    """List the transforms of the gradient, or tell all about one."""
    _tell("transforms", kind, markdown=markdown)


@cli.command()
def reducers(kind: Kind = None, markdown: Markdown = False) -> None:
    """List the ways in which many contributions become one gradient, or tell all about one."""
    _tell("reducers", kind, markdown=markdown)


def _tell(family: str, kind: str | None, *, markdown: bool) -> None:
    if markdown:
        typer.echo(listing.markdown(family), nl=False)
    elif kind is None:
        typer.echo(listing.overview(family), nl=False)
    else:
        try:
            typer.echo(listing.page(family, kind), nl=False)
        except LookupError as error:
            typer.echo(f"ravine: {error.args[0]}", err=True)
            raise typer.Exit(2) from None


def main() -> None:
    """The command `ravine`."""
    cli()
