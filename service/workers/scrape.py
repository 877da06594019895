"""GET /metrics of one worker, for all of them: its own, and what the others tell it, each with a label `worker`.

Not sums: a worker that is started again counts from 0, which Prometheus sees of a series, and could not see of a sum
(`rate` would take the whole of what the others have counted for new); and of what is so and so much now, such as a
process's memory, a sum says little. `sum without (worker) (rate(…))` is what a dashboard wants.

Each worker tells its own on a unix socket to whoever asks. One that does not answer in PATIENCE is left out of that
scrape; `ravine_worker_up` says which.
"""

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from service.workers.berth import Berth

# With the second for which each may wait for the store, well below the ten that Prometheus waits.
PATIENCE: Final = 3.0
_END: Final = "# EOF"
_UP: Final = "ravine_worker_up"

Write = Callable[[str], Awaitable[tuple[bytes, str]]]


class Scrape:
    """`write` gives this worker's metrics and their media type for an Accept, each sample labelled with its number."""

    def __init__(self, berth: Berth, write: Write) -> None:
        self._berth = berth
        self._write = write
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        """From now on the others are answered."""
        path = self._berth.metrics(self._berth.number)
        with contextlib.suppress(FileNotFoundError):  # of one that was killed
            os.unlink(path)
        self._server = await asyncio.start_unix_server(self._tell, path)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            with contextlib.suppress(OSError):
                os.unlink(self._berth.metrics(self._berth.number))

    async def text(self, accept: str) -> tuple[bytes, str]:
        """The metrics of all, and their media type."""
        others = self._berth.others
        asked = asyncio.gather(*(self._ask(number, accept) for number in others))
        own, media = await self._write(accept)
        told = dict(zip(others, await asked, strict=True))
        told[self._berth.number] = own
        return await asyncio.to_thread(_together, told), media

    async def _tell(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(PATIENCE):
                accept = await reader.readline()
                text, _ = await self._write(accept.decode("latin-1"))
                writer.write(b"%d\n" % len(text))
                writer.write(text)
                await writer.drain()
        except (OSError, ValueError, TimeoutError):
            pass
        finally:
            writer.close()

    async def _ask(self, number: int, accept: str) -> bytes:
        """What the other one tells; nothing, if it does not."""
        writer: asyncio.StreamWriter | None = None
        form = "application/openmetrics-text" if "application/openmetrics-text" in accept else ""
        try:
            async with asyncio.timeout(PATIENCE):
                reader, writer = await asyncio.open_unix_connection(self._berth.metrics(number))
                writer.write(form.encode() + b"\n")
                # Of one that dies meanwhile, half a line would make Prometheus refuse what all have told.
                return await reader.readexactly(int(await reader.readline()))
        except (OSError, ValueError, EOFError, TimeoutError):
            return b""
        finally:
            if writer is not None:
                writer.close()


def _together(told: dict[int, bytes]) -> bytes:
    """The texts of all, by number, as one: the samples of a family must stand together, under one heading."""
    headings: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    ended = False
    for number in sorted(told):
        lines = told[number].decode().splitlines()
        ended |= _END in lines[-1:]
        _sort(lines, headings, samples)
    up = [f'{_UP}{{worker="{number}"}} {1 if text else 0}.0' for number, text in sorted(told.items())]
    headings[_UP] = [f"# HELP {_UP} 1 if the worker told its metrics for this scrape, else 0.", f"# TYPE {_UP} gauge"]
    samples[_UP] = up
    lines = [line for family in headings for line in (*headings[family], *samples[family])]
    return "\n".join([*lines, *([_END] if ended else []), ""]).encode()


def _sort(lines: Iterable[str], headings: dict[str, list[str]], samples: dict[str, list[str]]) -> None:
    """Lines of one text by family, which begins with its HELP."""
    family, new = "", False
    for line in lines:
        if line.startswith("# HELP "):
            family = line.split(" ", 3)[2]
            new = family not in headings
            headings.setdefault(family, [])
            samples.setdefault(family, [])
        if line == _END:
            continue
        if not line.startswith("#"):
            samples[family].append(line)
        elif new:
            headings[family].append(line)
