"""`ravine serve`: the service on a port."""

import signal
import socket
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
import uvicorn
from pydantic import ValidationError

from service import listing, logs, memory
from service.app import App, create_app
from service.settings import Settings

cli = typer.Typer(
    name="ravine",
    help="Ravine: optimization as a service. Open an optimizer session over HTTP, post gradients, get updates back.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _option(name: str, *flags: str) -> Any:
    """An option whose help, default and variable are those of the setting `name`."""
    field = Settings.model_fields[name]
    default = "none" if field.default is None else str(field.default)
    shown = {"memory": "1GiB", "data": "./ravine-data"}.get(name, default)
    help_ = f"{field.description} [default: {shown}; variable: RAVINE_{name.upper()}]"
    return typer.Option(*(flags or (f"--{name.replace('_', '-')}",)), help=help_, show_default=False)


@cli.callback()
def _root() -> None:
    """Ravine: optimization as a service."""


@cli.command()
def serve(
    host: Annotated[str | None, _option("host")] = None,
    port: Annotated[int | None, _option("port")] = None,
    data: Annotated[Path | None, _option("data")] = None,
    redis_url: Annotated[str | None, _option("redis_url")] = None,
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
        "data": data,
        "redis_url": redis_url,
        "durability": durability,
        "memory": memory_,
        "log_format": log_format,
    }
    try:
        settings = Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        for fault in error.errors():
            typer.echo(
                f"ravine: {'.'.join(map(str, fault['loc']))}: {fault['msg'].removeprefix('Value error, ')}", err=True
            )
        raise typer.Exit(2) from None
    logs.configure(settings.log_format)
    memory.return_large_arrays()
    raise typer.Exit(_run(settings))


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


def _run(settings: Settings) -> int:
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        lifespan="on",
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nothing here depends on the client's address
        # Longer than a client that steps now and then is silent: closed on it, its next step would be reset.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
    )
    server = Server(config, app)
    # uvicorn raises the signal that stopped it once more when it has drained; an orderly stop is no failure.
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, _leave)
    server.run()
    return 0 if server.started else 1


def _leave(*_: object) -> None:
    raise SystemExit(0)


class Server(uvicorn.Server):
    """Says where it listens, and ends what waits for ever when it is told to stop."""

    def __init__(self, config: uvicorn.Config, app: App) -> None:
        super().__init__(config)
        self._app = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._app.tell_to_stop()
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            memory.collect_less_often()
            _greet(self._app, *self._address())

    def _address(self) -> tuple[str, int]:
        for server in self.servers:
            for listening in server.sockets:
                host, port = listening.getsockname()[:2]
                return str(host), int(port)
        return self.config.host, self.config.port

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        print("ravine: stopping; requests under way are answered first", file=sys.stderr, flush=True)
        self._app.drain()
        await super().shutdown(sockets)


def _greet(app: App, host: str, port: int) -> None:
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    kind = "Redis" if app.settings.redis_url else "embedded Valkey"
    print(
        f"Ravine listens on {url} (reference: {url}/docs)\n"
        f"Sessions are kept in {app.store_place} ({kind})\n"
        f"Try:\n"
        f'  curl --json \'{{"optimizer": "adam", "params": {{"w": [1, 2]}}}}\' {url}/v1/sessions',
        file=sys.stderr,
        flush=True,
    )


def main() -> None:
    """The command `ravine`."""
    cli()
