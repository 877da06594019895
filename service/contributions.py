"""What a client sends with a step, read from either format.

JSON has one object, whose members are those of `JSON_MEMBERS`; one of `PAYLOADS` holds what is contributed. A tensor in
it is a number, nested lists, or one of

    {"indices": [4, 17], "values": [[…], […]]}        row-sparse
    {"positions": [40, 171], "values": [0.5, -2]}     top-k: places in the flat, row-major tensor
    {"values": [[5, -127], [0, 3]], "scale": 0.01}    quantized, which the values of the other two may be as well

safetensors holds tensors alone, so the other members are query parameters (`QUERY_MEMBERS`), and a tensor's name
says what it is, ':' being reserved in the names of sessions' tensors: `service.tensors` has them all.

The metadata of such a file is not looked at. The arrays are views of the body wherever they can be. Which tensors
there must be, and of which shapes, is known to the session alone and checked there.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, NoReturn, TypeGuard, get_args

import numpy as np

from core.aggregation.ledger import is_name
from core.compression import Numbers, Places, Quantized
from core.contributions import Contribution, Payload
from core.layout import Array, Rows, Sent
from service.errors import Fault, InvalidRequest
from service.tensors import check_floats, of_tensors
from service.wire import json, safetensors
from service.wire.inflate import Body
from service.wire.json import MAX_INTEGER, MAX_NESTING, pointer

WORKER: Final = "must be 1 to 64 of the characters A-Z, a-z, 0-9, '.', '_' and '-'"
MAX_WEIGHT: Final = 1e12  # weights are multiplied with gradients, in the session's dtype
_MAX_FAULTS: Final = 64
_INTEGERS: Final = np.dtype("<i8")
_INT8: Final = np.iinfo(np.int8)
PAYLOADS: Final[tuple[Payload, ...]] = get_args(Payload)


# -- members that are no tensors: each with what is wrong with a value, or None --------------------------------


def _returns(value: object) -> str | None:
    known = type(value) is str and value in ("params", "updates", "none")
    return None if known else 'must be "params", "updates" or "none"'


def _flag(value: object) -> str | None:
    return None if type(value) is bool else "must be true or false"


def _is_finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)


def _loss(value: object) -> str | None:
    return None if _is_finite(value) else "must be a finite number"


def _weight(value: object) -> str | None:
    known = _is_finite(value) and 1 / MAX_WEIGHT <= value <= MAX_WEIGHT
    return None if known else f"must be a number greater than 0: from {1 / MAX_WEIGHT:g} to {MAX_WEIGHT:g}"


def _base_step(value: object) -> str | None:
    known = type(value) is int and 0 <= value <= MAX_INTEGER
    return None if known else f"must be an integer from 0 to {MAX_INTEGER}"


def _worker(value: object) -> str | None:
    return None if is_name(value) else WORKER


def _payload(value: object) -> str | None:
    return None if value in PAYLOADS else 'must be "gradients", "deltas" or "params"'


_CHECKS: Final[Mapping[str, Callable[[object], str | None]]] = {
    "return": _returns,
    "loss": _loss,
    "partial": _flag,
    "worker": _worker,
    "base_step": _base_step,
    "weight": _weight,
    "payload": _payload,
}

QUERY_MEMBERS: Final = frozenset(_CHECKS)
# In JSON the payload is named by the member that holds it.
JSON_MEMBERS: Final = QUERY_MEMBERS - {"payload"} | {*PAYLOADS, "hessian", "hessian_diagonal"}


def _check(given: Mapping[str, Any], allowed: Collection[str], at: str) -> None:
    """Raises InvalidRequest with every fault of the members `given`, whose values stand at pointers below `at`."""
    faults = [
        Fault(pointer(at, name[:64]), f"there is no member {name[:64]!r} here, but {', '.join(sorted(allowed))}")
        for name in sorted(given.keys() - frozenset(allowed))[:_MAX_FAULTS]
    ]
    for name in sorted(given.keys() & QUERY_MEMBERS & frozenset(allowed)):
        sentence = _CHECKS[name](given[name])
        if sentence is not None:
            faults.append(Fault(pointer(at, name), sentence))
    if faults:
        raise InvalidRequest(faults)


# -- text of the query, as values ------------------------------------------------------------------------------

_NUMBER: Final = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_STEP: Final = re.compile(r"0|[1-9][0-9]{0,15}")
_FLAGS: Final = {"true": True, "false": False}


def number(text: str) -> float | None:
    """A number as JSON writes it; None for anything else, and for one beyond the range of float64."""
    value = float(text) if _NUMBER.fullmatch(text) else math.inf
    return value if math.isfinite(value) else None


def integer(text: str) -> int | None:
    """A step as it is written in decimal; None for anything else."""
    return int(text) if _STEP.fullmatch(text) else None


_VALUES: Final[Mapping[str, Callable[[str], object]]] = {
    "loss": number,
    "weight": number,
    "base_step": integer,
    "partial": _FLAGS.get,
}


def members_of_query(query: Mapping[str, str]) -> Mapping[str, Any]:
    """The members of a step that is sent as safetensors. Raises InvalidRequest."""
    if not query:
        return query
    members = {name: _VALUES[name](text) if name in _VALUES else text for name, text in query.items()}
    _check(members, QUERY_MEMBERS, "/query")
    return members


# -- JSON ------------------------------------------------------------------------------------------------------


def of_json(body: Body) -> tuple[Contribution, Mapping[str, Any]]:
    """The contribution, and the members beside it. Raises MalformedJSON, InvalidValue, InvalidRequest."""
    given = _object(json.loads(body), JSON_MEMBERS)
    payload = _payload_of(given)
    sent: Mapping[str, Sent]
    if payload == "params":
        sent, params = _dense(given["params"], "/params"), None
    else:
        tensors = _named(given[payload], "/" + payload)
        sent = {name: _tensor(value, pointer("", payload, name)) for name, value in tensors.items()}
        params = _dense(given["params"], "/params") if "params" in given else None
    diagonal = _dense(given["hessian_diagonal"], "/hessian_diagonal") if "hessian_diagonal" in given else None
    contribution = Contribution(
        gradients=sent,
        params=params,
        hessian=_numbers(given["hessian"], "/hessian") if "hessian" in given else None,
        hessian_diagonal=diagonal,
        payload=payload,
        **_beside(given),
    )
    return contribution, given


def _beside(members: Mapping[str, Any]) -> dict[str, Any]:
    """The members that a Contribution has under the same names."""
    names = ("loss", "partial", "worker", "base_step", "weight")
    return {name: members[name] for name in names if name in members}


def _payload_of(given: Mapping[str, Any]) -> Payload:
    """Raises InvalidRequest."""
    if "gradients" in given and "deltas" in given:
        _refuse("/deltas", "stands beside `gradients`: a step brings one of the two")
    found: Payload | None = next((payload for payload in PAYLOADS if payload in given), None)
    if found is None:
        _refuse("/gradients", "this member is required, or in its place `deltas`, or `params` alone")
    return found


def params_of_json(body: Body) -> dict[str, Array]:
    """The tensors of `{"params": {…}}`. Raises MalformedJSON, InvalidValue, InvalidRequest."""
    given = _object(json.loads(body), ("params",))
    if "params" not in given:
        _refuse("/params", "this member is required")
    return _dense(given["params"], "/params")


def _object(given: object, allowed: Collection[str]) -> dict[str, Any]:
    """A JSON object. Raises InvalidRequest."""
    if type(given) is not dict:
        _refuse("", "the body must be a JSON object")
    _check(given, allowed, "")
    return given


def _named(given: object, at: str) -> dict[str, Any]:
    if type(given) is not dict:
        _refuse(at, 'must be an object such as {"w": [[0.1, 0.2]]}')
    return given


def _dense(given: object, at: str) -> dict[str, Array]:
    return {name: _numbers(value, pointer(at, name)) for name, value in _named(given, at).items()}


def _numbers(value: object, at: str) -> Array:
    """With however many dimensions: the session knows what shape it must have, and can say so."""
    return json.tensor(value, at, MAX_NESTING)


_FORMS: Final = frozenset(
    frozenset(form)
    for form in (
        ("indices", "values"),
        ("positions", "values"),
        ("values", "scale"),
        ("indices", "values", "scale"),
        ("positions", "values", "scale"),
    )
)


def _tensor(value: object, at: str) -> Sent:
    if type(value) is not dict:
        return _numbers(value, at)
    if frozenset(value) not in _FORMS:
        _refuse(
            at,
            "must be a tensor, or an object with `values`, with at most one of `indices` and `positions`, with `scale` "
            "if the values are int8, and with nothing else",
        )
    plain = _numbers(value["values"], at + "/values")
    numbers: Numbers = _quantized(plain, value["scale"], at) if "scale" in value else plain
    if "indices" in value:
        return Rows(_integers(value["indices"], at + "/indices", "row"), numbers)
    if "positions" in value:
        return Places(_integers(value["positions"], at + "/positions", "position in the flat tensor"), numbers)
    return numbers


def _integers(given: object, at: str, what: str) -> Array:
    if type(given) is not list:
        _refuse(at, f"must be a list of integers, each the number of a {what}")
    if not set(map(type, given)) <= {int}:
        wrong = next(place for place, number in enumerate(given) if type(number) is not int)
        _refuse(pointer(at, wrong), f"must be an integer: the number of a {what}")
    return np.array(given, _INTEGERS)


def _quantized(numbers: Array, scale: object, at: str) -> Quantized:
    if not _is_finite(scale):
        _refuse(at + "/scale", "must be a finite number")
    wrong = np.argwhere((numbers < _INT8.min) | (numbers > _INT8.max) | (numbers != np.rint(numbers)))
    if len(wrong):
        _refuse(pointer(at, "values", *wrong[0].tolist()), f"must be an integer from {_INT8.min} to {_INT8.max}")
    return Quantized(numbers.astype(np.int8), float(scale))


def _refuse(at: str, detail: str) -> NoReturn:
    raise InvalidRequest([Fault(at, detail)])


# -- safetensors -----------------------------------------------------------------------------------------------


def of_safetensors(body: Body, members: Mapping[str, Any]) -> Contribution:
    """The contribution that the file and `members` make up. Raises MalformedSafetensors."""
    tensors, _ = safetensors.read(body, dtypes=safetensors.STEP_DTYPES)
    return of_tensors(tensors, payload=members.get("payload", "gradients"), **_beside(members))


def params_of_safetensors(body: Body) -> dict[str, Array]:
    """Raises MalformedSafetensors."""
    tensors, _ = safetensors.read(body)
    for name, array in tensors.items():
        check_floats(name, array)
    return tensors
