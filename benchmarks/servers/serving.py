"""Runs an application as `service.cli` runs the service: the same uvicorn, with the same settings, in one process."""

import socket
import sys
from typing import Any

import uvicorn


class Server(uvicorn.Server):
    """Says where it listens."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            print(f"listens on http://{host}:{port}", file=sys.stderr, flush=True)


def run(app: Any) -> None:
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, access_log=False, server_header=False)
    Server(config).run()
