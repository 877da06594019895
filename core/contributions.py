"""What is sent to a session, and the checks that it must pass before it may change anything."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from core.aggregation.ledger import Sender
from core.compression import Places
from core.errors import (
    HessianRequired,
    InvalidRecipe,
    LossRequired,
    MissingGradient,
    NonFinite,
    NotReducible,
    ParamsHeld,
    ParamsRequired,
    ShapeMismatch,
)
from core.layout import Array, Rows, Sent, Slot, cast, check_rows, merge_rows, spread
from core.recipe import Recipe
from core.state import State
from core.sums import norm

Payload: TypeAlias = Literal["gradients", "deltas", "params"]


@dataclass(frozen=True, slots=True)
class Contribution:
    """A gradient: tensors by name, in any dtype that can be cast; and what some methods need beside it.

    `payload` says what the tensors are: gradients; the sender's parameters minus those it started from; or its
    parameters. `base_step` is the step of the parameters that it started from, `weight` how much it counts, `at` the
    time in seconds (Unix) at which it was taken in. `pulls`: its sender is given the parameters that come of it.
    """

    gradients: Mapping[str, Sent]
    params: Mapping[str, Array] | None = None
    hessian: Array | None = None
    hessian_diagonal: Mapping[str, Array] | None = None
    loss: float | None = None
    partial: bool = False
    payload: Payload = "gradients"
    worker: str | None = None
    base_step: int | None = None
    weight: float = 1.0
    at: float = 0.0
    pulls: bool = False

    @property
    def sender(self) -> Sender:
        return Sender(self.worker, self.base_step, float(self.weight), self.at, self.pulls)


@dataclass(frozen=True, slots=True)
class Closing:
    """The open round, which is to be this one, is closed: what came so far becomes a step."""

    round: int


@dataclass(frozen=True, slots=True)
class Pull:
    """`worker` was given the parameters as they stand, at the time `at` in seconds (Unix)."""

    worker: str
    at: float


@dataclass(frozen=True, slots=True)
class NewParams:
    """The parameters are set, all of them."""

    params: Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class NewRecipe:
    """Hyperparameters, groups or transforms change; kind, shapes and dtype cannot."""

    recipe: Recipe


Entry: TypeAlias = Contribution | Closing | Pull | NewParams | NewRecipe


@dataclass(slots=True)
class Gradient:
    """A contribution that was checked: cast, in the session's dtype, finite unless a transform mends what is not."""

    dense: list[tuple[Slot, Array]]  # flat
    rows: list[tuple[Slot, Rows]]  # sorted, each row once
    params: Mapping[str, Array] | None
    hessian: Array | None
    diagonal: Mapping[str, Array]  # of the Hessian, flat
    loss: float | None
    norm: float
    sender: Sender | None = None  # None: whoever sent it makes no difference
    coefficient: float = 1.0  # what it is yet to be multiplied by, on its way into a round
    raw: "Gradient | None" = None  # as it was before a delay was compensated, where that is remembered


@dataclass(slots=True)
class FlatParams:
    """New parameters that were checked: one flat array (n,) of their own."""

    params: Array


@dataclass(slots=True)
class Reduced:
    """A closing that was checked: what the round comes to. `gradient` None: it is worked out in the round's arrays."""

    norm: float
    loss: float | None
    gradient: Gradient | None


Checked: TypeAlias = Gradient | Reduced | Pull | FlatParams | NewRecipe


def checked_gradient(recipe: Recipe, state: State, entry: Contribution, point: Array | None = None) -> Gradient:
    """Raises a CoreError where `entry` cannot be applied to `state`. `point` (n,) is what a worker's parameters are
    compared with, where the entry brings those.
    """
    dense: list[tuple[Slot, Array]] = []
    rows: list[tuple[Slot, Rows]] = []
    for name, array in entry.gradients.items():
        if isinstance(array, Rows):
            slot = recipe.layout.find(name)
            check_rows(slot, array)
            rows.append((slot, merge_rows(array, recipe.numpy_dtype)))
        elif isinstance(array, Places):
            slot = recipe.layout.find(name)
            dense.append((slot, spread(slot, array, recipe.numpy_dtype)))
        else:
            dense.append((recipe.layout.fit(name, array), cast(array, recipe.numpy_dtype).reshape(-1)))
    _check_complete(recipe, entry)
    dense.sort(key=_start)
    rows.sort(key=_start)
    if entry.loss is None and "loss" in recipe.needs:
        raise LossRequired("this session's method looks at the loss: send it with the gradient, as `loss`")
    if entry.payload == "params" and point is not None:
        if rows or any(isinstance(array, Places) for array in entry.gradients.values()):
            raise NotReducible("a worker's parameters are whole tensors; rows and places are for gradients and deltas")
        with np.errstate(all="ignore"):
            dense = [(slot, point[slot.start : slot.stop] - array) for slot, array in dense]
    params = _checked_params(recipe, state, entry)
    hessian = _checked_hessian(recipe, entry)
    diagonal = _checked_diagonal(recipe, state, entry)
    return Gradient(dense, rows, params, hessian, diagonal, entry.loss, _finite_norm(recipe, dense, rows))


def _start(pair: tuple[Slot, Any]) -> int:
    return pair[0].start


def _check_complete(recipe: Recipe, entry: Contribution) -> None:
    if entry.partial and not recipe.whole_only:
        return
    if len(entry.gradients) < len(recipe.layout.slots):
        names = [slot.name for slot, _ in recipe.live()] if entry.partial else recipe.layout.names
        missing = next((name for name in names if name not in entry.gradients), None)
        if missing is not None:
            raise MissingGradient(missing)


def _checked_params(recipe: Recipe, state: State, entry: Contribution) -> Mapping[str, Array] | None:
    if state.params is not None:
        if entry.params is not None:
            raise ParamsHeld("this session holds the parameters itself: leave `params` out, or PUT them")
        return None
    if recipe.held_only:
        reason = f"{recipe.optimizer.kind} hands out the points at which gradients are taken"
        if recipe.averaging is not None:
            reason = "averaging works on the parameters"
        elif recipe.aggregation.delay_compensation is not None:
            reason = "a delay is compensated by how the parameters moved meanwhile"
        raise ParamsRequired(f"{reason}: give the parameters to the session first, at step 0")
    if "params" not in recipe.needs:
        return None
    if entry.params is None:
        raise ParamsRequired(
            f"{recipe.optimizer.kind} works on the parameters, which this session's client holds: "
            "send them with the step, as `params`"
        )
    return _named(recipe, entry, entry.params, "value under `params`")


def _named(recipe: Recipe, entry: Contribution, tensors: Mapping[str, Array], what: str) -> dict[str, Array]:
    """`tensors`, flat and cast; there must be one for each gradient."""
    for name in entry.gradients:
        if name not in tensors:
            raise MissingGradient(name, what)
    found = {}
    for name, array in tensors.items():
        recipe.layout.fit(name, array)
        found[name] = finite(name, cast(array, recipe.numpy_dtype)).reshape(-1)
    return found


def _checked_hessian(recipe: Recipe, entry: Contribution) -> Array | None:
    if entry.hessian is None:
        if "hessian" in recipe.needs:
            raise HessianRequired(f"{recipe.optimizer.kind} needs the Hessian: send it as `hessian`")
        return None
    expected = (recipe.layout.size, recipe.layout.size)
    if entry.hessian.shape != expected:
        raise ShapeMismatch("hessian", expected, entry.hessian.shape)
    return finite("hessian", cast(entry.hessian, np.dtype(np.float64)))


def _checked_diagonal(recipe: Recipe, state: State, entry: Contribution) -> Mapping[str, Array]:
    if entry.hessian_diagonal is not None:
        return _named(recipe, entry, entry.hessian_diagonal, "diagonal under `hessian_diagonal`")
    t = state.moves + 1
    if "hessian_diagonal" in recipe.needs and any(variant.at(t).due(t) for variant in recipe.variants):
        raise HessianRequired(
            f"{recipe.optimizer.kind} is due to see the diagonal of the Hessian: send it as `hessian_diagonal`"
        )
    return {}


def _finite_norm(recipe: Recipe, dense: list[tuple[Slot, Array]], rows: list[tuple[Slot, Rows]]) -> float:
    arrays = [array for _, array in dense] + [rows.values.reshape(-1) for _, rows in rows]
    found = norm(arrays)
    mends_nan, mends_infinity = recipe.mends
    if math.isfinite(found) or (mends_nan and mends_infinity):
        return found
    # The squares of a float64 gradient may be too large, which is no fault.
    for (slot, _), array in zip([*dense, *rows], arrays, strict=True):
        wrong = np.isinf(array) if mends_nan else ~np.isfinite(array)
        if wrong.any():
            raise NonFinite(slot.name, array.dtype.name)
    return found


def finite(name: str, array: Array) -> Array:
    """`array` itself. Raises NonFinite."""
    if not np.isfinite(array).all():
        raise NonFinite(name, array.dtype.name)
    return array


def flatten(recipe: Recipe, tensors: Mapping[str, Array], what: str) -> Array:
    """All tensors by name as one flat array (n,) of its own. Raises TensorError."""
    for name, array in tensors.items():
        recipe.layout.fit(name, array)
    flat = np.empty(recipe.layout.size, recipe.numpy_dtype)
    for slot in recipe.layout:
        if slot.name not in tensors:
            raise MissingGradient(slot.name, what)
        flat[slot.start : slot.stop] = finite(slot.name, cast(tensors[slot.name], recipe.numpy_dtype)).reshape(-1)
    return flat


def _kinds(optimizer: Any) -> list[str]:
    """The kind of an optimizer, of what it wraps, and so on."""
    return [] if optimizer is None else [optimizer.kind, *_kinds(getattr(optimizer, "base", None))]


def check_change(old: Recipe, state: State, new: Recipe) -> None:
    """Raises InvalidRecipe where a running session cannot go on with `new`."""
    if _kinds(new.optimizer) != _kinds(old.optimizer):
        raise InvalidRecipe("/optimizer/kind", "the kind of a running session's optimizer cannot change")
    if new.method.family != old.method.family:
        raise InvalidRecipe(
            _pointer_of_change(old, new), "the matrix form of a running session's optimizer cannot change"
        )
    fixed = ("layout", "dtype", "averaging", "state_dtype", "state_seed", "aggregation")
    for name in fixed:
        if getattr(new, name) != getattr(old, name):
            pointer = "/shapes" if name == "layout" else f"/{name}"
            raise InvalidRecipe(pointer, "shapes, dtype, averaging and aggregation of a running session cannot change")
    if new.held_only and not old.held_only and state.params is None and state.step > 0:
        raise InvalidRecipe("/optimizer", "for this the session would have to hold the parameters, and its client does")
    _check_meaning(old, new)
    pointer = _pointer_of_change(old, new)
    if new.method.family == "whole" and new.method.slots != old.method.slots:
        raise InvalidRecipe(pointer, "this would change how much the method remembers, which cannot change")
    for name, own in new.own.items():
        if name in old.own and old.own[name]._replace(fill=0.0) != own._replace(fill=0.0):
            raise InvalidRecipe(pointer, f"this would change the shape of the state {name!r}, which cannot change")


def _check_meaning(old: Recipe, new: Recipe) -> None:
    """Raises InvalidRecipe where numbers of the state would be read as something else than they were written as."""
    for name in new.layout.names:
        before, after = (recipe.variants[recipe.choices[name] or 0].meaning for recipe in (old, new))
        for option in before.keys() & after.keys():
            if before[option] != after[option]:
                raise InvalidRecipe(
                    "/optimizer" + "/base" * len(new.wrappers) + f"/{option}",
                    f"the state of {name!r} was made under another {option}, which a running session cannot change",
                )


def _pointer_of_change(old: Recipe, new: Recipe) -> str:
    """The first option of the method itself that is another one."""
    at = "/optimizer" + "/base" * len(new.wrappers)
    changed = [name for name, value in vars(new.method).items() if vars(old.method).get(name) != value]
    return f"{at}/{changed[0]}" if changed else at
