"""An open round: what is taken into it, and what it comes to.

Mean and sum are one running array, whoever contributes and however many: each contribution is added block by block in
float64 and rounded once, in the order of the log. The other reducers keep the contributions until the round is closed.
"""

import math

import numpy as np

from core.aggregation.incoming import bounded, noisy, scaled
from core.aggregation.rounds import Round
from core.contributions import Closing, Gradient, Reduced
from core.errors import RoundOpen
from core.layout import Array, Rows, Slot, unfolded
from core.recipe import Recipe
from core.state import State
from core.sums import BLOCK, norm

LOSS, HESSIAN, DIAGONAL = ":loss", ":hessian", ":hessian_diagonal"
LARGEST = float(np.finfo(np.float64).max)


@np.errstate(all="ignore")
def take_in(recipe: Recipe, round_: Round, gradient: Gradient, weight: float) -> None:
    """Adds a contribution that was checked to the open round."""
    if recipe.aggregation.reduce.running:
        _add(recipe, round_, gradient, weight)
    else:
        whole = np.zeros(recipe.layout.size, recipe.numpy_dtype)
        for slot, array in gradient.dense:
            whole[slot.start : slot.stop] = scaled(array, gradient.coefficient)
        for slot, rows in gradient.rows:
            values = scaled(rows.values, gradient.coefficient)
            whole[slot.start : slot.stop] = unfolded(slot.shape, Rows(rows.indices, values))
        round_.kept.append(whole)
        round_.shares.append(weight)
    if gradient.loss is not None:
        _count(round_, LOSS, weight)
        if recipe.aggregation.reduce.running:
            round_.loss = float(np.clip(round_.loss + weight * gradient.loss, -LARGEST, LARGEST))
        else:  # nobody's weight is to move it, nor a single one's word
            round_.losses.append(gradient.loss)
    _take_beside(recipe, round_, gradient, weight)


def _add(recipe: Recipe, round_: Round, gradient: Gradient, weight: float) -> None:
    share, infinite = weight * gradient.coefficient, recipe.mends[1]
    if round_.total is None:
        round_.total = np.zeros(recipe.layout.size, recipe.numpy_dtype)
    for slot, array in gradient.dense:
        _accumulate(round_.total[slot.start : slot.stop], array, share, infinite=infinite)
        round_.rows[slot.name] = None
        _count(round_, slot.name, weight)
    for slot, rows in gradient.rows:
        part = round_.total[slot.start : slot.stop].reshape(slot.shape)
        part[rows.indices] = _sum(part[rows.indices], rows.values, share, infinite=infinite)
        known = round_.rows.get(slot.name, rows.indices[:0])
        round_.rows[slot.name] = None if known is None else np.union1d(known, rows.indices).astype(np.int64)
        _count(round_, slot.name, weight)


def _take_beside(recipe: Recipe, round_: Round, gradient: Gradient, weight: float) -> None:
    """What comes beside a gradient: Hessians are averaged too, parameters are the same whoever sends them."""
    if "hessian" in recipe.needs and gradient.hessian is not None:
        if round_.hessian is None:
            round_.hessian = np.zeros_like(gradient.hessian)
        _accumulate(round_.hessian.reshape(-1), gradient.hessian.reshape(-1), weight)
        _count(round_, HESSIAN, weight)
    if gradient.diagonal and "hessian_diagonal" in recipe.needs:
        if round_.diagonal is None:
            round_.diagonal = np.zeros(recipe.layout.size, recipe.numpy_dtype)
        for name, array in gradient.diagonal.items():
            slot = recipe.layout.slots[name]
            _accumulate(round_.diagonal[slot.start : slot.stop], array, weight)
            _count(round_, f"{DIAGONAL}:{name}", weight)
    if gradient.params is not None:
        if round_.params is None:
            round_.params = np.zeros(recipe.layout.size, recipe.numpy_dtype)
        for name, array in gradient.params.items():
            slot = recipe.layout.slots[name]
            round_.params[slot.start : slot.stop] = array


def _accumulate(total: Array, array: Array, share: float, *, infinite: bool = False) -> None:
    for start in range(0, array.size, BLOCK):
        block = slice(start, start + BLOCK)
        total[block] = _sum(total[block], array[block], share, infinite=infinite)


def _sum(total: Array, array: Array, share: float, *, infinite: bool) -> Array:
    """total + share · array in float64, within the dtype of `total`: infinity and its opposite would be NaN.

    `infinite`: a transform is to see what overflowed.
    """
    found: Array = total + share * array.astype(np.float64, copy=False)
    end = float(np.finfo(total.dtype).max)
    return found if infinite else np.clip(found, -end, end)


def _count(round_: Round, name: str, weight: float) -> None:
    round_.weights[name] = round_.weights.get(name, 0.0) + weight


# -- closing -----------------------------------------------------------------------------------------------------------


@np.errstate(all="ignore")
def checked_closing(recipe: Recipe, state: State, entry: Closing) -> Reduced:
    """What the open round comes to; nothing is changed. Raises RoundOpen where it cannot be closed."""
    aggregation, round_ = recipe.aggregation, state.round
    received = state.ledger.received
    if not aggregation.rounds or entry.round != state.step + 1 or received < aggregation.fewest:
        raise RoundOpen(f"round {entry.round} cannot be closed at step {state.step} with {received} contributions")
    loss = _loss(round_)
    if not aggregation.reduce.running:
        reduced = bounded(aggregation.reduce.reduce(round_.kept, round_.shares), recipe)
        gradient = _gradient(recipe, round_, reduced, loss)
        return Reduced(gradient.norm, loss, gradient)
    assert round_.total is not None
    if aggregation.noise_multiplier is not None:
        gradient = noisy(recipe, _worked_out(recipe, round_, round_.total.copy(), loss), received, entry.round)
        return Reduced(gradient.norm, loss, gradient)
    parts = [
        norm([round_.total[slot.start : slot.stop]]) / _divisor(recipe, round_, slot)
        for slot in recipe.layout
        if slot.name in round_.weights
    ]
    return Reduced(math.hypot(*parts), loss, None)


@np.errstate(all="ignore")
def closed(recipe: Recipe, round_: Round, reduced: Reduced) -> Gradient:
    """The gradient of the step that the round becomes. The round's arrays are used up."""
    if reduced.gradient is not None:
        return reduced.gradient
    assert round_.total is not None
    return _worked_out(recipe, round_, round_.total, reduced.loss, reduced.norm)


def _worked_out(recipe: Recipe, round_: Round, total: Array, loss: float | None, found: float = 0.0) -> Gradient:
    """The mean or sum, in the place of `total`."""
    for slot in recipe.layout:
        if slot.name in round_.weights:
            part, divisor = total[slot.start : slot.stop], _divisor(recipe, round_, slot)
            for start in range(0, part.size, BLOCK):
                block = slice(start, start + BLOCK)
                part[block] = bounded(part[block].astype(np.float64, copy=False) / divisor, recipe)
    return _gradient(recipe, round_, total, loss, found)


def _loss(round_: Round) -> float | None:
    """The mean of the losses by weight, or where contributions are compared their median."""
    if round_.losses:
        ordered, middle = sorted(round_.losses), len(round_.losses) // 2
        return ordered[middle] if len(ordered) % 2 else ordered[middle - 1] / 2 + ordered[middle] / 2
    if LOSS not in round_.weights:
        return None
    return float(np.clip(round_.loss / round_.weights[LOSS], -LARGEST, LARGEST))


def _divisor(recipe: Recipe, round_: Round, slot: Slot) -> float:
    return round_.weights[slot.name] if recipe.aggregation.reduce.kind == "mean" else 1.0


def _gradient(recipe: Recipe, round_: Round, flat: Array, loss: float | None, found: float | None = None) -> Gradient:
    """`flat` (n,) as the gradient of a step; a tensor that every contribution left out is left out."""
    dense: list[tuple[Slot, Array]] = []
    rows: list[tuple[Slot, Rows]] = []
    for slot in recipe.layout:
        part, indices = flat[slot.start : slot.stop], round_.rows.get(slot.name)
        if indices is not None:
            rows.append((slot, Rows(indices, part.reshape(slot.shape)[indices])))
        elif slot.name in round_.weights or not recipe.aggregation.reduce.running:
            dense.append((slot, part))
    hessian = None
    if round_.hessian is not None:
        hessian = np.clip(round_.hessian / round_.weights[HESSIAN], -LARGEST, LARGEST)
    params = None if round_.params is None else _flat_views(recipe, round_.params)
    diagonal = {}
    for slot in recipe.layout:
        weight = round_.weights.get(f"{DIAGONAL}:{slot.name}")
        if round_.diagonal is not None and weight is not None:
            diagonal[slot.name] = bounded(round_.diagonal[slot.start : slot.stop] / weight, recipe)
    found = norm([flat]) if found is None else found
    return Gradient(dense, rows, params, hessian, diagonal, loss, found)


def _flat_views(recipe: Recipe, flat: Array) -> dict[str, Array]:
    return {slot.name: flat[slot.start : slot.stop] for slot in recipe.layout}
