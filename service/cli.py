"""`ravine serve`: the service on a port."""

import asyncio
import os
import signal
import socket
import ssl
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
import uvicorn

from service import __version__, listing, logs, memory
from service.admission import open_files
from service.app import App, create_app
from service.commands import backup
from service.commands import keys as keys_command
from service.commands import sessions as sessions_command
from service.commands.options import option as _option
from service.commands.options import settings_of
from service.outlet import LINGER
from service.protocol import guarded
from service.settings import Settings

ACCEPTED_AT_ONCE = 16

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
    raise typer.Exit(_run(settings))


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


def _run(settings: Settings) -> int:
    app = create_app(settings)
    app.admission.limits = app.admission.limits._replace(connections=open_files(settings.max_connections))
    config = uvicorn.Config(
        app,
        http=guarded(app.admission),
        ws="none",
        lifespan="on",
        host=settings.host,
        port=settings.port,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
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
    try:
        server.run()
    except SystemExit:
        if server.started:
            raise
    return 0 if server.started else app.exit_code


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
            await self._listen_more()
            memory.collect_less_often()
            _greet(self._app, *self._address())

    async def _listen_more(self) -> None:
        """Several handles on each socket that is listened on.

        A handle takes one new connection in each turn of the loop (libuv since 1.45). Under load a turn takes long, and
        whoever was new waited for seconds, however soon the others were answered.
        """
        loop, config = asyncio.get_running_loop(), self.config

        def protocol() -> asyncio.Protocol:
            make: Any = config.http_protocol_class
            made: asyncio.Protocol = make(config=config, server_state=self.server_state, app_state=self.lifespan.state)
            return made

        # uvicorn's own handle is given up with the others made: under TLS it lets a handshake take a minute.
        limits: dict[str, Any] = {}
        if config.ssl is not None:
            limits = {"ssl_handshake_timeout": self._app.settings.header_seconds, "ssl_shutdown_timeout": LINGER}
        given, self.servers = self.servers, []
        for listening in [listening for server in given for listening in server.sockets]:
            for _ in range(ACCEPTED_AT_ONCE):
                again = socket.socket(fileno=os.dup(listening.fileno()))
                self.servers.append(
                    await loop.create_server(protocol, sock=again, ssl=config.ssl, backlog=config.backlog, **limits)
                )
        for server in given:
            server.close()

    def _address(self) -> tuple[str, int]:
        for server in self.servers:
            for listening in server.sockets:
                host, port = listening.getsockname()[:2]
                return str(host), int(port)
        return self.config.host, self.config.port

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        logs.say("ravine: stopping; requests under way are answered first")
        self._app.drain()
        await super().shutdown(sockets)


def _greet(app: App, host: str, port: int) -> None:
    scheme = "http" if app.settings.tls_cert is None else "https"
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
    kind = "Redis" if app.settings.redis_url else "embedded Valkey"
    logs.say(
        f"Ravine listens on {url} (reference: {url}/docs)\n"
        f"Sessions are kept in {app.store_place} ({kind})\n"
        f"Try:\n"
        f'  curl --json \'{{"optimizer": "adam", "params": {{"w": [1, 2]}}}}\' {url}/v1/sessions'
    )


def main() -> None:
    """The command `ravine`."""
    cli()
