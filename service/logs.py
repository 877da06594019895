"""Log lines: structured, on standard error, each with the id of the request that it belongs to.

A line per request would cost 50 µs through a logging framework, half of what a small step takes. So these lines are
made here and written together ten times a second; everything else goes through structlog.

A line that cannot be written (the disk is full, nobody reads the pipe) is lost, and whoever wrote it goes on: the task
that starts the store again tells of it first.
"""

import asyncio
import contextlib
import io
import re
import sys
import time
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal, TextIO, cast

import orjson
import structlog

# A key that somebody put where none belongs, such as into a path; its id may be told.
_SECRET = re.compile(r"(rvn_[a-z0-9]{12,32}_)[A-Za-z0-9_-]+")

request_id: ContextVar[str] = ContextVar("request_id", default="")
FLUSH_SECONDS = 0.1


class _Lossy(io.TextIOBase):
    """`stream`, that never fails: what cannot be written is lost."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


def configure(form: Literal["text", "json"], stream: TextIO = sys.stderr, worker: int | None = None) -> None:
    """Once, at the start of the process; of a `worker` again, so that its lines say which it is."""
    renderer: Any = structlog.processors.JSONRenderer()
    if form == "text":
        renderer = structlog.dev.ConsoleRenderer(
            colors=stream.isatty(),
            pad_event_to=0,
            # the pretty one shows local variables: bodies, and secrets
            exception_formatter=structlog.dev.plain_traceback,
        )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="time" if form == "json" else "timestamp"),
            _with_request,
            _as_it_is if worker is None else _of_worker(worker),
            _without_secrets,
            structlog.processors.format_exc_info if form == "json" else _as_it_is,
            renderer,
        ],
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, _Lossy(stream))),
        cache_logger_on_first_use=True,
    )


def say(text: str) -> None:
    """To whoever started the process."""
    print(text, file=_Lossy(sys.stderr), flush=True)


def _as_it_is(_logger: Any, _method: str, event: Any) -> Any:
    return event


def _of_worker(number: int) -> Any:
    def named(_logger: Any, _method: str, event: Any) -> Any:
        event["worker"] = number
        return event

    return named


def _with_request(_logger: Any, _method: str, event: Any) -> Any:
    if current := request_id.get():
        event["request_id"] = current
    return event


def _without_secrets(_logger: Any, _method: str, event: Any) -> Any:
    return {name: without_secrets(value) if isinstance(value, str) else value for name, value in event.items()}


def without_secrets(text: str) -> str:
    """`text` with the keys in it made unusable."""
    return _SECRET.sub(r"\1…", text) if "rvn_" in text else text


class AccessLog:
    """A line per request."""

    def __init__(self, form: Literal["text", "json"], stream: TextIO = sys.stderr, worker: int | None = None) -> None:
        self._worker = {} if worker is None else {"worker": worker}
        self._suffix = "" if worker is None else f" worker={worker}"
        self._json = form == "json"
        self._stream = _Lossy(stream)
        self._lines: list[str] = []
        self._scheduled = False
        self._second = -1
        self._until_second = ""

    def _now(self) -> str:
        """As isoformat has it; made anew once a second, for it takes as long as the rest of a line."""
        second, rest = divmod(time.time_ns() // 1000, 1_000_000)
        if second != self._second:
            self._second = second
            self._until_second = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S.")
        return f"{self._until_second}{rest:06}Z"

    def write(self, method: str, path: str, status: int, seconds: float, request: str) -> None:
        moment = self._now()
        if self._json:
            line = orjson.dumps(
                {
                    "event": "request",
                    "level": "info",
                    "time": moment,
                    "method": method,
                    "path": path,
                    "status": status,
                    "ms": round(seconds * 1e3, 3),
                    "request_id": request,
                    **self._worker,
                }
            ).decode()
        else:
            # A path arrives decoded and may hold line breaks and worse.
            shown = path if path.isprintable() else ascii(path)
            line = f"{moment} {method} {shown} {status} {seconds * 1e3:.1f} ms request_id={request}{self._suffix}"
        self._lines.append(without_secrets(line))
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_later(FLUSH_SECONDS, self.flush)

    def flush(self) -> None:
        self._scheduled = False
        if self._lines:
            self._stream.write("\n".join(self._lines) + "\n")
            self._lines.clear()
            self._stream.flush()
