"""What the service refuses, beside what the core and the wire refuse.

ServiceError
├── InvalidRequest        one or more faults, each with a JSON pointer
├── UnsupportedMedia      a Content-Type or Content-Encoding that is not read (accepted)
├── NotAcceptable         an Accept that nothing here satisfies (offered)
├── Unauthenticated       no key, or none that is valid
├── Forbidden             a key that is not for this call
├── SessionNotFound
├── StepConflict          If-Match does not hold (step, commit)
├── Superseded            what was looked at has changed since; nobody is told: it is looked at again
├── NoRounds              each contribution is a step (mode)
├── StateLost             the store went back (acknowledged, found: where the session stood and stands)
├── UnknownFormat         the store has what a newer release wrote (format, supported)
├── KeyReused             an Idempotency-Key that came with another body before
├── QuotaExceeded         more than the tenant may have, or more often (quota, standing)
├── Overloaded            too much is under way already (resource)
├── StoreUnavailable      the store does not answer; whether a write took effect is unknown
│   └── Unconfirmed       it took effect, and is not as safe yet as was asked for
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


class Unauthenticated(ServiceError):
    """One and the same whether there is no key, or it is wrong, revoked or expired."""


class Forbidden(ServiceError):
    """The key is valid, and what it asks for is not of its scope."""


class SessionNotFound(ServiceError):
    def __init__(self, session: str) -> None:
        super().__init__(f"there is no session {session[:64]!r}")


class StepConflict(ServiceError):
    """Nothing was applied; the session stands at `step`."""

    def __init__(self, step: int, commit: str) -> None:
        super().__init__(f"If-Match does not hold: the session stands at step {step}")
        self.step = step
        self.commit = commit


class Superseded(ServiceError):
    """Somebody else changed the session's document since a change of it, or a copy, was made room for."""


class Place(NamedTuple):
    """Where a session stands for a client: its step, and the ETag."""

    step: int
    etag: str


class StateLost(ServiceError):
    """Steps were acknowledged up to `acknowledged`, and the store has another past, up to `found`."""

    def __init__(self, session: str, acknowledged: Place, found: Place) -> None:
        super().__init__(
            f"the store lost acknowledged steps of {session}: it was seen at step {acknowledged.step}, ETag "
            f"{acknowledged.etag}, which the store does not know of; it stands at step {found.step}, ETag {found.etag}"
        )
        self.acknowledged = acknowledged
        self.found = found


class UnknownFormat(ServiceError):
    """What is stored is of the `format` of another release; this one reads those `supported`."""

    def __init__(self, what: str, format_: str, supported: Sequence[str]) -> None:
        super().__init__(f"{what} is of format {format_!r}; this release reads {', '.join(supported)}")
        self.format = format_
        self.supported = list(supported)


class NoRounds(ServiceError):
    def __init__(self, mode: str) -> None:
        super().__init__(f"in mode {mode} each contribution is a step: there are no rounds")


class KeyReused(ServiceError):
    def __init__(self, key: str) -> None:
        super().__init__(f"the Idempotency-Key {key!r} was used before with another body")


class Standing(NamedTuple):
    """Where somebody stands with the quota called `name`: `left` of `limit`; more after `seconds`.

    `window` is the seconds that `limit` is for, None where it is no rate; `unit` is what is counted, None: requests.
    """

    name: str
    limit: int
    left: int
    seconds: int
    window: int | None = None
    unit: str | None = None


class QuotaExceeded(ServiceError):
    """Nothing was changed. `quota` is sessions, state, requests or rate."""

    def __init__(self, quota: str, sentence: str, standing: Standing) -> None:
        super().__init__(sentence)
        self.quota = quota
        self.standing = standing


class Overloaded(ServiceError):
    """Nothing was begun for the request. `resource` is what there is too much of, an admission.Resource."""

    retry_after = 1

    def __init__(self, resource: str) -> None:
        super().__init__(f"too much is under way already: {resource}")
        self.resource = resource


class StoreUnavailable(ServiceError):
    """Send the same again: with an Idempotency-Key or If-Match nothing is applied twice."""

    retry_after = 1


class Unconfirmed(StoreUnavailable):
    """The store has the write, but not on its disk, or not at its replicas, and may yet lose it."""


class StoreFull(ServiceError):
    """The store refuses to grow; nothing was changed."""


class Corrupt(ServiceError):
    """A stored value failed its checks; nothing is guessed from it."""
