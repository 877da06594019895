"""What a client sends with a step, read from either format.

JSON has one object, whose members are those of `JSON_MEMBERS`. A tensor in it is a number, nested lists, or
row-sparse: `{"indices": [4, 17], "values": [[…], […]]}`.

safetensors holds tensors alone, so the other members are query parameters (`QUERY_MEMBERS`), and a tensor's name
says what it is, ':' being reserved in the names of sessions' tensors:

    w                       the gradient of w
    w:indices, w:values     the same, row-sparse: row numbers in I64, and the rows
    w:params                the value of w, where the client holds the parameters
    w:hessian_diagonal      the diagonal of the Hessian, for w
    :hessian                the Hessian

The metadata of such a file is not looked at. The arrays are views of the body wherever they can be. Which tensors
there must be, and of which shapes, is known to the session alone and checked there.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, NoReturn, TypeGuard

import numpy as np

from core.contributions import Contribution
from core.layout import Array, Rows
from service.errors import Fault, InvalidRequest
from service.http import is_worker
from service.tensors import check_floats, of_tensors
from service.wire import json, safetensors
from service.wire.inflate import Body
from service.wire.json import MAX_INTEGER, MAX_NESTING, pointer

_MAX_FAULTS: Final = 64
_ROWS: Final = np.dtype("<i8")


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
    return None if _is_finite(value) and value > 0 else "must be a finite number greater than 0"


def _base_step(value: object) -> str | None:
    known = type(value) is int and 0 <= value <= MAX_INTEGER
    return None if known else f"must be an integer from 0 to {MAX_INTEGER}"


def _worker(value: object) -> str | None:
    known = type(value) is str and is_worker(value)
    return None if known else "must be 1 to 64 of the characters A-Z, a-z, 0-9, '.', '_' and '-'"


_CHECKS: Final[Mapping[str, Callable[[object], str | None]]] = {
    "return": _returns,
    "loss": _loss,
    "partial": _flag,
    "worker": _worker,
    "base_step": _base_step,
    "weight": _weight,
}

QUERY_MEMBERS: Final = frozenset(_CHECKS)
JSON_MEMBERS: Final = QUERY_MEMBERS | {"gradients", "params", "hessian", "hessian_diagonal"}


def _check(given: Mapping[str, Any], allowed: Collection[str], at: str) -> None:
    """Raises InvalidRequest with every fault of the members `given`, whose values stand at pointers below `at`."""
    faults = [
        Fault(pointer(at, name[:64]), f"there is no member {name[:64]!r} here, but {', '.join(sorted(allowed))}")
        for name in sorted(given.keys() - frozenset(allowed))[:_MAX_FAULTS]
    ]
    for name in sorted(given.keys() & QUERY_MEMBERS):
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
    given = _object(json.loads(body), JSON_MEMBERS, "gradients")
    params, hessian, diagonal = (given.get(name) for name in ("params", "hessian", "hessian_diagonal"))
    contribution = Contribution(
        {name: _tensor(value, pointer("/gradients", name)) for name, value in given["gradients"].items()},
        None if "params" not in given else _dense(params, "/params"),
        None if "hessian" not in given else _numbers(hessian, "/hessian"),
        None if "hessian_diagonal" not in given else _dense(diagonal, "/hessian_diagonal"),
        given.get("loss"),
        given.get("partial", False),
    )
    return contribution, given


def params_of_json(body: Body) -> dict[str, Array]:
    """The tensors of `{"params": {…}}`. Raises MalformedJSON, InvalidValue, InvalidRequest."""
    return _dense(_object(json.loads(body), ("params",), "params")["params"], "/params")


def _object(given: object, allowed: Collection[str], required: str) -> dict[str, Any]:
    """A JSON object with the member `required`, which is an object too. Raises InvalidRequest."""
    if type(given) is not dict:
        _refuse("", "the body must be a JSON object")
    _check(given, allowed, "")
    if required not in given:
        _refuse("/" + required, "this member is required")
    if type(given[required]) is not dict:
        _refuse("/" + required, 'must be an object such as {"w": [[0.1, 0.2]]}')
    return given


def _dense(given: object, at: str) -> dict[str, Array]:
    if type(given) is not dict:
        _refuse(at, 'must be an object such as {"w": [[0.1, 0.2]]}')
    return {name: _numbers(value, pointer(at, name)) for name, value in given.items()}


def _numbers(value: object, at: str) -> Array:
    """With however many dimensions: the session knows what shape it must have, and can say so."""
    return json.tensor(value, at, MAX_NESTING)


def _tensor(value: object, at: str) -> Array | Rows:
    if type(value) is not dict:
        return _numbers(value, at)
    if value.keys() != {"indices", "values"}:
        _refuse(at, "must be a tensor, or row-sparse: an object with `indices` and `values` and nothing else")
    indices: object = value["indices"]
    if type(indices) is not list:
        _refuse(at + "/indices", "must be a list of row numbers")
    if not set(map(type, indices)) <= {int}:
        wrong = next(position for position, index in enumerate(indices) if type(index) is not int)
        _refuse(pointer(at, "indices", wrong), "must be an integer: the number of a row")
    return Rows(np.array(indices, _ROWS), _numbers(value["values"], at + "/values"))


def _refuse(at: str, detail: str) -> NoReturn:
    raise InvalidRequest([Fault(at, detail)])


# -- safetensors -----------------------------------------------------------------------------------------------


def of_safetensors(body: Body, members: Mapping[str, Any]) -> Contribution:
    """The contribution that the file and `members` make up. Raises MalformedSafetensors."""
    tensors, _ = safetensors.read(body)
    return of_tensors(tensors, members.get("loss"), members.get("partial", False))


def params_of_safetensors(body: Body) -> dict[str, Array]:
    """Raises MalformedSafetensors."""
    tensors, _ = safetensors.read(body)
    for name, array in tensors.items():
        check_floats(name, array)
    return tensors
