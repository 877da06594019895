"""Lua scripts over the store's own connections, by their digest: whole only where the store does not know them."""

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias

from redis.exceptions import NoScriptError

from service.link import Argument

# Sends one command. Raises StoreUnavailable, StoreFull.
Call: TypeAlias = Callable[..., Awaitable[Any]]


class Script:
    """Called with keys and arguments. Raises StoreUnavailable (whether it ran is then unknown), StoreFull."""

    __slots__ = ("_call", "_sha", "_text")

    def __init__(self, call: Call, text: str | bytes) -> None:
        self._call = call
        self._text = text.encode() if isinstance(text, str) else text
        self._sha = hashlib.sha1(self._text, usedforsecurity=False).hexdigest()

    async def __call__(self, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        try:
            return await self._call("EVALSHA", self._sha, len(keys), *keys, *args)
        except NoScriptError:
            return await self._call("EVAL", self._text, len(keys), *keys, *args)
