"""A step as named tensors, the form in which it is sent as safetensors and stands in the log.

    w                                  a gradient (or delta, or parameters: what the step's `payload` says)
    w (I8), w:scale                    the same, quantized: scale · w
    w:indices, w:values[, w:scale]     row-sparse: row numbers (I64), and the rows, in I8 with a scale
    w:positions, w:values[, w:scale]   top-k: places in the flat, row-major tensor (I64), and their values
    w:params                           the value of w, where the client holds it
    w:hessian_diagonal, :hessian       the part of the Hessian's diagonal that belongs to w; the Hessian

A ':' is in no tensor's own name, so nothing can be mistaken.
"""

from collections.abc import Mapping
from typing import Final

import numpy as np

from core.compression import Numbers, Places, Quantized
from core.contributions import Contribution, Gradient, Payload
from core.layout import Array, Rows, Sent, cast
from service.wire.errors import MalformedSafetensors

_INTEGERS: Final = np.dtype("<i8")
_INT8: Final = np.dtype("i1")
_SCALES: Final = (np.dtype("<f4"), np.dtype("<f8"))
_WHERE: Final[Mapping[str, type[Rows | Places]]] = {"indices": Rows, "positions": Places}
_PARTS: Final = frozenset({"values", "scale", *_WHERE})


def of_tensors(
    tensors: Mapping[str, Array],
    loss: float | None = None,
    partial: bool = False,
    *,
    payload: Payload = "gradients",
    worker: str | None = None,
    base_step: int | None = None,
    weight: float = 1.0,
    at: float = 0.0,
) -> Contribution:
    """A step from its named tensors, as a request or the log has them. Raises MalformedSafetensors."""
    whole: dict[str, Array] = {}
    pieces: dict[str, dict[str, Array]] = {}
    beside: dict[str, dict[str, Array]] = {"params": {}, "hessian_diagonal": {}}
    hessian: Array | None = None
    for name, array in tensors.items():
        owner, _, part = name.rpartition(":")
        if owner and part in _PARTS:
            pieces.setdefault(owner, {})[part] = array
        elif owner and part in beside:
            check_floats(name, array)
            beside[part][owner] = array
        elif name == ":hessian":
            check_floats(name, array)
            hessian = array
        else:
            whole[name] = array  # a name that is none of these is no tensor of the session either
    if payload == "params" and pieces:
        raise MalformedSafetensors(f"the parameters of {next(iter(pieces))[:64]!r} must be there whole, in floats")
    names = dict.fromkeys([*whole, *pieces])
    sent = {name: _sent(name, whole.get(name), pieces.get(name, {})) for name in names}
    return Contribution(
        gradients=sent,
        params=beside["params"] or None,
        hessian=hessian,
        hessian_diagonal=beside["hessian_diagonal"] or None,
        loss=loss,
        partial=partial,
        payload=payload,
        worker=worker,
        base_step=base_step,
        weight=weight,
        at=at,
    )


def tensors_of(contribution: Contribution, gradient: Gradient) -> dict[str, Array]:
    """A step's named tensors for the log, each as it came or cast to the session's dtype, whichever is smaller.

    So a compressed contribution stays small, and JSON's numbers are not logged as float64 for nothing.
    """
    arrays = [*gradient.dense, *((slot, rows.values) for slot, rows in gradient.rows)]
    dtype = arrays[0][1].dtype if arrays else np.dtype(np.float64)
    # What came from nobody in particular was cast, and nothing else done to it, when it was checked.
    known = {slot.name: array for slot, array in gradient.dense} if gradient.sender is None else {}
    tensors: dict[str, Array] = {}
    for name, sent in contribution.gradients.items():
        if isinstance(sent, Rows):
            tensors[f"{name}:indices"] = sent.indices
            tensors |= _numbers_of(name, f"{name}:values", sent.values, dtype)
        elif isinstance(sent, Places):
            tensors[f"{name}:positions"] = sent.positions
            tensors |= _numbers_of(name, f"{name}:values", sent.values, dtype)
        elif name in known and not isinstance(sent, Quantized) and sent.dtype.itemsize > dtype.itemsize:
            tensors[name] = known[name].reshape(sent.shape)
        else:
            tensors |= _numbers_of(name, name, sent, dtype)
    if contribution.params is not None:
        tensors |= {f"{name}:params": array for name, array in contribution.params.items()}
    if contribution.hessian_diagonal is not None:
        tensors |= {f"{name}:hessian_diagonal": array for name, array in contribution.hessian_diagonal.items()}
    if contribution.hessian is not None:
        tensors[":hessian"] = contribution.hessian
    return tensors


def _numbers_of(owner: str, name: str, numbers: Numbers, dtype: np.dtype[np.float64]) -> dict[str, Array]:
    if isinstance(numbers, Quantized):
        return {name: numbers.integers, f"{owner}:scale": np.array(numbers.scale)}
    return {name: cast(numbers, dtype) if numbers.dtype.itemsize > dtype.itemsize else numbers}


def _sent(name: str, whole: Array | None, parts: Mapping[str, Array]) -> Sent:
    """The tensor `name`, which is there as `whole` or in `parts`, if all is right with them."""
    shown = repr(name[:64])
    where = [part for part in _WHERE if part in parts]
    if len(where) + (whole is not None) > 1:
        raise MalformedSafetensors(f"tensor {shown} is there twice: whole, by rows or by positions is one too many")
    if not where and "values" in parts:
        raise MalformedSafetensors(f"the values of {shown} need ':indices' or ':positions' beside them")
    values = parts.get("values") if where else whole
    if values is None:
        raise MalformedSafetensors(f"tensor {shown} has {_listed(parts)}, and no values that belong to it")
    numbers = _numbers(f"{name}:values" if where else name, values, parts.get("scale"))
    if not where:
        return numbers
    indices = parts[where[0]]
    if indices.dtype != _INTEGERS:
        raise MalformedSafetensors(f"the {where[0]} of tensor {shown} must be I64")
    return _WHERE[where[0]](indices, numbers)


def _listed(parts: Mapping[str, Array]) -> str:
    return ", ".join(f"':{part}'" for part in parts)


def _numbers(name: str, values: Array, scale: Array | None) -> Numbers:
    if values.dtype != _INT8:
        check_floats(name, values)
        if scale is not None:
            raise MalformedSafetensors(f"there is a scale for {name[:64]!r}, which is not I8")
        return values
    if scale is None:
        raise MalformedSafetensors(f"tensor {name[:64]!r} is I8, and its scale is not there")
    if scale.dtype not in _SCALES or scale.shape not in ((), (1,)):
        raise MalformedSafetensors(f"the scale of {name[:64]!r} must be one number, in F32 or F64")
    return Quantized(values, float(scale.reshape(())))


def check_floats(name: str, array: Array) -> None:
    """Raises MalformedSafetensors for a tensor of integers."""
    if array.dtype.kind == "i":
        kind = "I8" if array.dtype == _INT8 else "I64"
        raise MalformedSafetensors(f"tensor {name[:64]!r} is {kind}; F64, F32, F16 and BF16 are read here")
