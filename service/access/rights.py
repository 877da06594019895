"""Who a caller is, and what each call asks of one: a single table for both planes.

The gate looks every request up here before either plane sees it. A call that is not in the table is refused, so a new
route is nobody's until somebody has decided whose it is; a test holds the table against the routes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final, Literal, TypeAlias, get_args

from service.index import DEFAULT_TENANT

Scope: TypeAlias = Literal["admin", "session", "worker"]
SCOPES: Final[tuple[Scope, ...]] = get_args(Scope)


@dataclass(frozen=True, slots=True)
class Access:
    """Who makes a request. The gate puts one into every request that it lets through, as `scope["ravine.access"]`.

    `tenant` is whose sessions it is about; `scope` what may be done with them; `key` the id of the key (not its
    secret), None for a caller without one, who is admin of the tenant `default`; `session` the one session that a
    key of the scope `worker` is bound to, None in other scopes; `rate` the key's own rate, such as "100/second",
    None where it has none. Calls that need no key (/livez, /readyz, /docs) are ANYBODY's, whatever key they bring.
    """

    tenant: str
    scope: Scope
    key: str | None = None
    session: str | None = None
    rate: str | None = None


ANYBODY: Final = Access(DEFAULT_TENANT, "admin")


def access_of(scope: Mapping[str, Any]) -> Access:
    """Who makes this request. A KeyError where no gate was passed: nobody is let in by mistake."""
    access: Access = scope["ravine.access"]
    return access


class Right(IntEnum):
    """What a call asks of its caller, in order: whoever has one of them has all those that stand above it here."""

    OPEN = 0  # no key
    KEY = 1  # a key of any scope: what is told is of no tenant
    WORK = 2  # a key of the session's tenant; a worker's for its own session
    SESSIONS = 3  # a key of the scope `session`
    ADMIN = 4  # a key of the scope `admin`
    OPERATOR = 5  # a key of the scope `admin`, of the tenant `default`: what is told is of all tenants


GRANTED: Final[Mapping[Scope, Right]] = {"worker": Right.WORK, "session": Right.SESSIONS, "admin": Right.ADMIN}


def granted(access: Access) -> Right:
    """The highest right that a caller has."""
    if access.scope == "admin" and access.tenant == DEFAULT_TENANT:
        return Right.OPERATOR
    return GRANTED[access.scope]


_SESSIONS: Final = "/v1/sessions"
_ONE: Final = "/v1/sessions/{session}"
_FAMILIES: Final = ("optimizers", "schedules", "transforms", "reducers")

# Path -> method -> what it asks. HEAD and OPTIONS are added below.
_CALLS: Final[dict[str, dict[str, Right]]] = {
    _SESSIONS: {"POST": Right.SESSIONS, "GET": Right.SESSIONS},
    _ONE: {"GET": Right.WORK, "PATCH": Right.SESSIONS, "DELETE": Right.SESSIONS},
    f"{_ONE}/steps": {"POST": Right.WORK},
    f"{_ONE}/params": {"GET": Right.WORK, "PUT": Right.SESSIONS},
    f"{_ONE}/state": {"GET": Right.SESSIONS},
    f"{_ONE}/events": {"GET": Right.WORK},
    f"{_ONE}/fork": {"POST": Right.SESSIONS},
    f"{_ONE}/history": {"GET": Right.SESSIONS},
    f"{_ONE}/schedule": {"GET": Right.SESSIONS},
    f"{_ONE}/workers": {"GET": Right.SESSIONS},
    f"{_ONE}/rounds/current": {"GET": Right.WORK},
    **{f"/v1/{family}": {"GET": Right.KEY} for family in _FAMILIES},
    **{f"/v1/{family}/{{kind}}": {"GET": Right.KEY} for family in _FAMILIES},
    "/openapi.json": {"GET": Right.KEY},
    "/problems": {"GET": Right.KEY},
    "/problems/{slug}": {"GET": Right.KEY},
    "/docs": {"GET": Right.OPEN},
    "/livez": {"GET": Right.OPEN},
    "/readyz": {"GET": Right.OPEN},
    "/metrics": {"GET": Right.OPERATOR},
}
_HEADLESS: Final = {f"{_ONE}/events"}  # a stream


def _completed(path: str, methods: Mapping[str, Right]) -> dict[str, Right]:
    found = {**methods, "OPTIONS": Right.KEY}
    if "GET" in methods and path not in _HEADLESS:
        found["HEAD"] = methods["GET"]
    return found


# The table.
CALLS: Final[Mapping[str, Mapping[str, Right]]] = {path: _completed(path, methods) for path, methods in _CALLS.items()}

_WHOLE: Final = {path: methods for path, methods in CALLS.items() if "{" not in path}
_OF_SESSION: Final = {
    path.removeprefix(_ONE).removeprefix("/"): methods for path, methods in CALLS.items() if path.startswith(_ONE)
}
# The other paths with a name in them have it at their end.
_NAMED: Final = {
    path.partition("{")[0]: methods
    for path, methods in CALLS.items()
    if path.endswith("}") and not path.startswith(_ONE)
}


def path_of(scope: Mapping[str, Any]) -> str:
    """The path of a request below the root that the application is mounted at."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root + "/") else path


def call_at(path: str) -> tuple[Mapping[str, Right] | None, str]:
    """The methods of a path, None if it is none of the service's; and the session that it names, or "".

    The path is taken as it stands, decoded once as both planes see it: another case, a doubled or an added slash, a dot
    for a directory make it another path, and there is nothing at those.
    """
    if path.startswith("/v1/sessions/"):
        session, _, resource = path[13:].partition("/")
        return (_OF_SESSION.get(resource) if session and not path.endswith("/") else None), session
    whole = _WHOLE.get(path)
    if whole is not None:
        return whole, ""
    directory, slash, name = path.rpartition("/")
    return (_NAMED.get(directory + slash) if name else None), ""
