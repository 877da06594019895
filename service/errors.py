"""What the service refuses, beside what the core and the wire refuse.

ServiceError
├── InvalidRequest        one or more faults, each with a JSON pointer
├── UnsupportedMedia      a Content-Type or Content-Encoding that is not read (accepted)
├── NotAcceptable         an Accept that nothing here satisfies (offered)
├── SessionNotFound
├── StepConflict          If-Match does not hold (step, commit)
├── NoRounds              each contribution is a step (mode)
├── KeyReused             an Idempotency-Key that came with another body before
├── StoreUnavailable      the store does not answer; whether a write took effect is unknown
├── StoreFull
└── Corrupt               what the store gave back is not what was put there
"""

from collections.abc import Sequence
from typing import NamedTuple


class Fault(NamedTuple):
    """`pointer` is an RFC 6901 JSON pointer into the request, `detail` a sentence."""

    pointer: str
    detail: str


class ServiceError(Exception):
    """Anything that the service refuses by itself."""


class InvalidRequest(ServiceError):
    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("; ".join(f"{fault.pointer or '/'}: {fault.detail}" for fault in faults))
        self.faults = list(faults)


class UnsupportedMedia(ServiceError):
    def __init__(self, what: str, received: str, accepted: Sequence[str]) -> None:
        super().__init__(f"{what} {received!r} is not read here; send {' or '.join(accepted)}")
        self.accepted = list(accepted)


class NotAcceptable(ServiceError):
    def __init__(self, received: str, offered: Sequence[str]) -> None:
        super().__init__(f"Accept {received!r} allows nothing that this call can send: {', '.join(offered)}")
        self.offered = list(offered)


class SessionNotFound(ServiceError):
    def __init__(self, session: str) -> None:
        super().__init__(f"there is no session {session[:64]!r}")


class StepConflict(ServiceError):
    """Nothing was applied; the session stands at `step`."""

    def __init__(self, step: int, commit: str) -> None:
        super().__init__(f"If-Match does not hold: the session stands at step {step}")
        self.step = step
        self.commit = commit


class NoRounds(ServiceError):
    def __init__(self, mode: str) -> None:
        super().__init__(f"in mode {mode} each contribution is a step: there are no rounds")


class KeyReused(ServiceError):
    def __init__(self, key: str) -> None:
        super().__init__(f"the Idempotency-Key {key!r} was used before with another body")


class StoreUnavailable(ServiceError):
    """Send the same again: with an Idempotency-Key or If-Match nothing is applied twice."""

    retry_after = 1


class StoreFull(ServiceError):
    """The store refuses to grow; nothing was changed."""


class Corrupt(ServiceError):
    """A stored value failed its checks; nothing is guessed from it."""
