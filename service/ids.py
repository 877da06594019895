"""Names that the server makes: of sessions, which sort by age, and of commits, which are random."""

import os
import secrets
import time

from service.errors import SessionNotFound

ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
_AT_ONCE = 256
_commits: list[str] = []  # drawn, and given to nobody yet
os.register_at_fork(after_in_child=_commits.clear)  # or two processes would give the same


def new_id() -> str:
    """`ses_`, nine characters of time, and 80 random bits; ids sort by age."""
    stamp, text = time.time_ns() // 1_000_000, ""
    for _ in range(9):
        stamp, digit = divmod(stamp, 36)
        text = ALPHABET[digit] + text
    return "ses_" + text + "".join(secrets.choice(ALPHABET) for _ in range(16))


def age_of(id_: str) -> float:
    """Seconds since `id_` was made."""
    return time.time() - int(id_[4:13], 36) / 1000


def new_commit() -> str:
    """64 random bits, so that no two histories of a session share a commit. In any thread."""
    try:
        return _commits.pop()
    except IndexError:  # not asked before: another thread may take the last one in between
        drawn = os.urandom(8 * _AT_ONCE).hex()  # a call of the kernel takes as long as a hundred of these
        _commits.extend(drawn[start : start + 16] for start in range(16, len(drawn), 16))
        return drawn[:16]


def checked_id(id_: str) -> str:
    """`id_` itself where it has the form of an id. Raises SessionNotFound."""
    if not (id_.startswith("ses_") and 24 <= len(id_) <= 64 and set(id_[4:]) <= set(ALPHABET)):
        raise SessionNotFound(id_)
    return id_
