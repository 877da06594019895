"""One process that serves: uvicorn with our protocol, from its start to its orderly end.

`run` is all of `ravine serve` where there is one worker. Where there are more, each of them is this, on sockets that
the supervisor has bound, with a `Berth` that says which of them it is (service/workers/).
"""

import asyncio
import os
import signal
import socket
from collections.abc import Sequence
from types import FrameType
from typing import Any

import uvicorn

from service import logs, memory
from service.admission import open_files
from service.app import App, create_app
from service.outlet import LINGER
from service.protocol import guarded
from service.settings import Settings
from service.workers.berth import Berth
from service.workers.routing import Handovers, routed

ACCEPTED_AT_ONCE = 16


def run(settings: Settings, berth: Berth | None = None, sockets: Sequence[socket.socket] = ()) -> int:
    """Serves until it is told to stop; gives the exit code. Without `sockets` it listens where `settings` say."""
    app = create_app(settings, berth)
    beside = 0 if berth is None else berth.files
    connections = max(1, open_files(settings.max_connections + beside) - beside)
    app.admission.limits = app.admission.limits._replace(connections=connections)
    # Under TLS the state of the cipher is in this process, and stays here.
    handovers = None if berth is None or settings.tls_cert is not None else Handovers(berth)
    if handovers is not None:
        app.handovers = handovers.counts
    config = uvicorn.Config(
        app,
        http=guarded(app.admission, app.takes) if handovers is None else routed(app.admission, handovers, app.takes),
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
    server = Server(config, app) if berth is None else Worker(config, app, berth, handovers)
    # uvicorn raises the signal that stopped it once more when it has drained; an orderly stop is no failure.
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, _leave)
    try:
        server.run(list(sockets) or None)
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
            await self._ready()

    async def _ready(self) -> None:
        greet(self._app.settings, *self._address())

    def protocol(self) -> asyncio.Protocol:
        """That of one more connection."""
        make: Any = self.config.http_protocol_class
        state = self.lifespan.state
        made: asyncio.Protocol = make(config=self.config, server_state=self.server_state, app_state=state)
        return made

    async def _listen_more(self) -> None:
        """Several handles on each socket that is listened on.

        A handle takes one new connection in each turn of the loop (libuv since 1.45). Under load a turn takes long, and
        whoever was new waited for seconds, however soon the others were answered.
        """
        loop, config = asyncio.get_running_loop(), self.config
        # uvicorn's own handle is given up with the others made: under TLS it lets a handshake take a minute.
        limits: dict[str, Any] = {}
        if config.ssl is not None:
            limits = {"ssl_handshake_timeout": self._app.settings.header_seconds, "ssl_shutdown_timeout": LINGER}
        given, self.servers = self.servers, []
        for listening in [listening for server in given for listening in server.sockets]:
            for _ in range(ACCEPTED_AT_ONCE):
                again = socket.socket(fileno=os.dup(listening.fileno()))
                self.servers.append(
                    await loop.create_server(
                        self.protocol, sock=again, ssl=config.ssl, backlog=config.backlog, **limits
                    )
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
        self._say_goodbye()
        self._app.drain()
        await super().shutdown(sockets)

    def _say_goodbye(self) -> None:
        logs.say("ravine: stopping; requests under way are answered first")


class Worker(Server):
    """One of several. Its supervisor is told when it serves, and speaks for all of them; it ends when that one does."""

    def __init__(self, config: uvicorn.Config, app: App, berth: Berth, handovers: Handovers | None) -> None:
        super().__init__(config, app)
        self._berth = berth
        self._handovers = handovers

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        # From before the start, which may wait half a minute for the store.
        asyncio.get_running_loop().add_reader(self._berth.alive, self._orphaned)
        await super().startup(sockets)

    def _orphaned(self) -> None:
        """Nobody holds the other end of the pipe any more."""
        asyncio.get_running_loop().remove_reader(self._berth.alive)
        os.kill(os.getpid(), signal.SIGTERM)

    async def _ready(self) -> None:
        if self._handovers is not None:
            await self._handovers.open(self.protocol)
        self._berth.tell_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._handovers is not None:
            # First: what others have handed over already is among what is answered yet.
            await self._handovers.close()
        await super().shutdown(sockets)

    def _say_goodbye(self) -> None:
        pass


def greet(settings: Settings, host: str, port: int) -> None:
    """Where it listens, for whoever started it."""
    scheme = "http" if settings.tls_cert is None else "https"
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
    kind = "Redis" if settings.redis_url else "embedded Valkey"
    shared = f" ({settings.workers} workers)" if settings.workers > 1 else ""
    logs.say(
        f"Ravine listens on {url}{shared} (reference: {url}/docs)\n"
        f"Sessions are kept in {settings.store_place} ({kind})\n"
        f"Try:\n"
        f'  curl --json \'{{"optimizer": "adam", "params": {{"w": [1, 2]}}}}\' {url}/v1/sessions'
    )
