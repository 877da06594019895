"""Keys: made, looked up, listed, revoked.

    rvn_<id>_<secret>     what a caller sends: the id finds the key, the secret (256 random bits) proves it
    ravine:key:<id>       hash: digest (SHA-256 of the secret, in hex), tenant, scope, session, rate, name, created_at,
                          expires_at
    ravine:keys           sorted set of the ids, by the time (Unix seconds) at which they were made

A secret has 256 bits, so a plain digest of it cannot be searched through, and there is nothing to salt: the slow hashes
for passwords make up for secrets that people choose. What is in the store opens nothing. An id is entered in the set
before its key exists and leaves it after the key is gone, so whatever breaks between the two leaves no key unlisted.

With ack=disk or replicated a key is made, or revoked, once that is as safe as was asked for. What is not confirmed is
done all the same, and is sent again by whoever wants it confirmed.
"""

import asyncio
import contextlib
import hashlib
import hmac
import re
import secrets
import string
from collections.abc import Awaitable, Callable
from time import monotonic, time
from typing import Any, Final, NamedTuple, cast

from service.access.rates import parse_rate
from service.access.rights import SCOPES, Access, Scope
from service.errors import Corrupt, Unconfirmed

KEYS: Final = "ravine:keys"
_TEXT: Final = re.compile(rb"rvn_([a-z0-9]{12,32})_([A-Za-z0-9_-]{43})")
_ALPHABET: Final = string.ascii_lowercase + string.digits
ID_LENGTH: Final = 16
SECRET_BYTES: Final = 32
# Seconds for which a key that was looked up is believed in: revoking it takes so long to have its effect.
BELIEVED: Final = 1.0
MAX_CACHED: Final = 10_000
# 1 where there was a key. Where there was none it writes, too: a barrier vouches for what its connection wrote, and for
# nothing if that was nothing.
_END: Final = """
if redis.call('DEL', KEYS[1]) == 1 then return 1 end
redis.call('HSET', KEYS[1], 'over', '')
redis.call('DEL', KEYS[1])
return 0
"""
# Compared with where there is no such key, so that the answer takes as long.
_NOBODY: Final = hashlib.sha256(b"nobody").hexdigest()


class Key(NamedTuple):
    """A key without its secret. `expires_at` and `created_at` in Unix seconds; None: never."""

    id: str
    digest: str
    tenant: str
    scope: Scope
    session: str | None
    rate: str | None
    name: str
    created_at: int
    expires_at: int | None

    @property
    def expired(self) -> bool:
        return self.expires_at is not None and time() >= self.expires_at

    def is_secret(self, digest: str) -> bool:
        """Whether `digest` is that of its secret; in a time that does not depend on how much of it is right."""
        return hmac.compare_digest(digest, self.digest)


def new_key(
    tenant: str,
    scope: Scope,
    *,
    session: str | None = None,
    rate: str | None = None,
    name: str = "",
    expires_at: int | None = None,
) -> tuple[str, Key]:
    """A key's text, which nobody can tell again, and what is kept of it."""
    id_ = "".join(secrets.choice(_ALPHABET) for _ in range(ID_LENGTH))
    secret = secrets.token_urlsafe(SECRET_BYTES)
    key = Key(id_, digest_of(secret.encode()), tenant, scope, session, rate, name, int(time()), expires_at)
    return f"rvn_{id_}_{secret}", key


def parsed(text: bytes) -> tuple[str, bytes] | None:
    """The id and the secret of a key's text; None for what is no such text."""
    found = _TEXT.fullmatch(text)
    return None if found is None else (found[1].decode(), found[2])


def digest_of(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()


class Keyring:
    """The keys in the store. `call` sends a command once, and waits until it is safe; `read` one that may be repeated.

    All methods raise StoreUnavailable; `add` and `revoke` Unconfirmed, and StoreFull, too.
    """

    def __init__(self, call: Callable[..., Awaitable[Any]], read: Callable[..., Awaitable[Any]]) -> None:
        self._call = call
        self._read = read

    async def add(self, key: Key) -> None:
        fields = {name: value for name, value in key._asdict().items() if name != "id"}
        pairs = [(name, "" if value is None else str(value)) for name, value in fields.items()]
        await self._call("ZADD", KEYS, key.created_at, key.id)
        await self._call("HSET", _name(key.id), *(part for pair in pairs for part in pair))

    async def get(self, id_: str) -> Key | None:
        """The key, expired or not; None where there is none, or none that this release understands."""
        try:
            reply = await self._read("HGETALL", _name(id_))
        except Corrupt:  # something else lies in its place
            return None
        return _key_of(id_, reply)

    async def all(self) -> list[Key]:
        """All keys, oldest first, the expired ones too."""
        ids = [member.decode("utf-8", "replace") for member in await self._read("ZRANGE", KEYS, 0, -1)]
        found = await asyncio.gather(*[self.get(id_) for id_ in ids])
        return [key for key in found if key is not None]

    async def revoke(self, id_: str) -> bool:
        """Whether there was such a key, or one whose end was not confirmed before: its id is still there then."""
        gone = await self._call("EVAL", _END, 1, _name(id_))
        left = 0
        with contextlib.suppress(Unconfirmed):  # an id without a key opens nothing
            left = await self._call("ZREM", KEYS, id_)
        return bool(gone or left)


def _name(id_: str) -> str:
    return f"ravine:key:{id_}"


def _key_of(id_: str, reply: Any) -> Key | None:
    """HGETALL's reply, which is a list or, of a cluster's client, a dict."""
    pairs = reply.items() if isinstance(reply, dict) else zip(reply[::2], reply[1::2], strict=True)
    try:
        fields = {name.decode(): value.decode() for name, value in pairs}
        if fields["scope"] not in SCOPES:
            return None
        if fields["rate"]:
            parse_rate(fields["rate"])
        return Key(
            id_,
            fields["digest"],
            fields["tenant"],
            cast("Scope", fields["scope"]),
            fields["session"] or None,
            fields["rate"] or None,
            fields["name"],
            int(fields["created_at"]),
            int(fields["expires_at"]) if fields["expires_at"] else None,
        )
    except (KeyError, ValueError):
        return None


class _Seen(NamedTuple):
    """What the store said of an id, and when (by the monotonic clock)."""

    key: Key
    access: Access
    at: float


class KnownKeys:
    """Whose a key is. What the store said is believed for BELIEVED seconds, of at most MAX_CACHED keys.

    Ids that there are none of are not remembered: whoever sends many of them pushes no valid key out. No more of them
    are asked for at once than requests are let in.
    """

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring
        self._seen: dict[str, _Seen] = {}
        self._asking: dict[str, asyncio.Task[_Seen | None]] = {}

    async def caller(self, text: bytes) -> Access | None:
        """Whose key `text` is; None if it is nobody's. Raises StoreUnavailable."""
        found = parsed(text)
        if found is None:
            return None
        id_, secret = found
        digest = digest_of(secret)
        seen = await self._valid(id_, BELIEVED)
        if seen is None:
            hmac.compare_digest(digest, _NOBODY)
            return None
        return seen.access if seen.key.is_secret(digest) else None

    def remembered(self, text: bytes) -> Access | None:
        """The same, where the store need not be asked; None: `caller` is to say."""
        found = parsed(text)
        seen = None if found is None else self._seen.get(found[0])
        if found is None or seen is None or monotonic() - seen.at >= BELIEVED or seen.key.expired:
            return None
        return seen.access if seen.key.is_secret(digest_of(found[1])) else None

    async def valid(self, id_: str, believed: float = BELIEVED) -> bool:
        """Whether the key is valid now, as the store said at most `believed` seconds ago. Raises StoreUnavailable."""
        return await self._valid(id_, believed) is not None

    async def _valid(self, id_: str, believed: float) -> _Seen | None:
        seen = self._seen.get(id_)
        if seen is None or monotonic() - seen.at >= believed:
            seen = await self._ask(id_)
        return None if seen is None or seen.key.expired else seen

    async def _ask(self, id_: str) -> _Seen | None:
        """Once, however many ask, and whoever of them goes away meanwhile."""
        asking = self._asking.get(id_)
        if asking is None:
            asking = self._asking[id_] = asyncio.create_task(self._look(id_))
            asking.add_done_callback(_heard)
        return await asyncio.shield(asking)

    async def _look(self, id_: str) -> _Seen | None:
        at = monotonic()  # before the question: the answer may be as old
        try:
            key = await self._keyring.get(id_)
        finally:
            del self._asking[id_]
        self._seen.pop(id_, None)
        if key is None:
            return None
        if len(self._seen) >= MAX_CACHED:
            del self._seen[next(iter(self._seen))]  # the one that was looked up the longest ago
        seen = self._seen[id_] = _Seen(key, Access(key.tenant, key.scope, key.id, key.session, key.rate), at)
        return seen


def _heard(asked: "asyncio.Task[_Seen | None]") -> None:
    """Whoever asked may be gone, and then nobody looks at what became of it."""
    if not asked.cancelled():
        asked.exception()
