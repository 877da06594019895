"""A step as named tensors, the form in which it is sent as safetensors and stands in the log.

`w` is a gradient; `w:indices` (I64) and `w:values` a row-sparse one; `w:params` the parameters of a client that holds
them; `:hessian` the Hessian, `w:hessian_diagonal` the part of its diagonal that belongs to w. A ':' is in no
tensor's own name, so nothing can be mistaken.
"""

from collections.abc import Mapping
from typing import Final

import numpy as np

from core.contributions import Contribution, Gradient
from core.layout import Array, Rows
from service.wire.errors import MalformedSafetensors

_ROWS: Final = np.dtype("<i8")


def of_tensors(tensors: Mapping[str, Array], loss: float | None, partial: bool) -> Contribution:
    """A step from its named tensors, as a request or the log has them. Raises MalformedSafetensors."""
    gradients: dict[str, Array | Rows] = {}
    params: dict[str, Array] = {}
    diagonal: dict[str, Array] = {}
    hessian: Array | None = None
    rows: dict[str, dict[str, Array]] = {}
    for name, array in tensors.items():
        owner, _, part = name.rpartition(":")
        if owner and part in ("indices", "values"):
            rows.setdefault(owner, {})[part] = array
            continue
        check_floats(name, array)
        if owner and part == "params":
            params[owner] = array
        elif owner and part == "hessian_diagonal":
            diagonal[owner] = array
        elif name == ":hessian":
            hessian = array
        else:
            gradients[name] = array  # a name that is none of these is no tensor of the session either
    for owner, parts in rows.items():
        gradients[owner] = _rows(owner, parts, gradients)
    return Contribution(gradients, params or None, hessian, diagonal or None, loss, partial)


def tensors_of(contribution: Contribution, gradient: Gradient) -> dict[str, Array]:
    """A step's named tensors for the log, each as it came or as it was cast, whichever is smaller.

    So a bfloat16 or row-sparse contribution stays small, and JSON's numbers are not logged as float64 for nothing.
    """
    narrow = {slot.name: flat.reshape(slot.shape) for slot, flat in gradient.dense}
    tensors: dict[str, Array] = {}
    for name, array in contribution.gradients.items():
        if isinstance(array, Rows):
            tensors[f"{name}:indices"], tensors[f"{name}:values"] = array
        else:
            tensors[name] = min(array, narrow[name], key=_itemsize)
    if contribution.params is not None:
        tensors |= {f"{name}:params": array for name, array in contribution.params.items()}
    if contribution.hessian_diagonal is not None:
        tensors |= {f"{name}:hessian_diagonal": array for name, array in contribution.hessian_diagonal.items()}
    if contribution.hessian is not None:
        tensors[":hessian"] = contribution.hessian
    return tensors


def _itemsize(array: Array) -> int:
    return array.dtype.itemsize


def _rows(owner: str, parts: Mapping[str, Array], dense: Mapping[str, object]) -> Rows:
    if len(parts) < 2:
        raise MalformedSafetensors(f"the row-sparse tensor {owner[:64]!r} needs both ':indices' and ':values'")
    if owner in dense:
        raise MalformedSafetensors(f"tensor {owner[:64]!r} is there twice, row-sparse and whole")
    if parts["indices"].dtype != _ROWS:
        raise MalformedSafetensors(f"the row numbers of tensor {owner[:64]!r} must be I64")
    check_floats(owner + ":values", parts["values"])
    return Rows(parts["indices"], parts["values"])


def check_floats(name: str, array: Array) -> None:
    if array.dtype == _ROWS:
        raise MalformedSafetensors(f"tensor {name[:64]!r} is I64; F64, F32, F16 and BF16 are read here")
