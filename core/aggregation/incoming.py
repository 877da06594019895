"""A contribution on its way in: what it says becomes the gradient that counts.

    the worker's parameters -> pseudo-gradient -> delay compensation -> clip_norm -> staleness -> a step, or the round

Where a contribution is a step, what is given out is the gradient of that step. On its way into a round it only carries
a coefficient, so that the round's sum is the only other array.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from core.aggregation.aggregation import Aggregation
from core.aggregation.ledger import Ahead
from core.aggregation.noise import gaussian
from core.contributions import Contribution, Gradient
from core.errors import NotReducible
from core.layout import Array, Rows, Slot, unfolded
from core.recipe import Recipe
from core.state import State
from core.sums import BLOCK, length, norm

# Of the adaptive compensation, λ / √(MS + ε): arXiv:1609.08326, section 6.
EPSILON = 1e-7


def check_form(recipe: Recipe, entry: Contribution, *, held: bool) -> None:
    """Raises NotReducible for a contribution that the aggregation has no meaning for; `held`: the session has the
    parameters.
    """
    aggregation = recipe.aggregation
    whole = not entry.partial and len(entry.gradients) == len(recipe.layout.slots)
    if aggregation.rounds and not aggregation.reduce.running and not whole:
        raise NotReducible(f"{aggregation.reduce.kind} compares whole contributions: leave no tensor out")
    if aggregation.rounds and not aggregation.reduce.running and "params" in recipe.needs and not held:
        raise NotReducible(
            f"{aggregation.reduce.kind} cannot tell whose parameters are right: give the session its own"
        )
    if aggregation.delay_compensation is not None and entry.payload == "params":
        raise NotReducible("a worker's parameters are compared with those of now: there is no delay to compensate")
    if aggregation.noise_multiplier is None:
        return
    if entry.weight != 1.0:
        raise NotReducible("the noise is enough for equal weights alone: leave `weight` out")
    if not whole:
        raise NotReducible("the noise is worked out for whole contributions: leave no tensor out")


def incoming(
    recipe: Recipe, state: State, entry: Contribution, gradient: Gradient, ahead: Ahead, point: Array | None
) -> Gradient:
    """`gradient` as it counts where the session stands; it is not written to. `point` (n,) is what workers are given
    now, and needed where a delay is compensated.
    """
    aggregation = recipe.aggregation
    if aggregation.plain and entry.payload != "deltas":
        return gradient
    if aggregation.delay_compensation is not None:
        gradient = replace(gradient, raw=gradient if aggregation.delay_compensation.adaptive else None)
        if entry.worker in state.delays.backups:
            assert point is not None
            gradient = _compensated(recipe, state, gradient, entry.worker or "", point, sign=_sign(entry))
    coefficient = _sign(entry) * _clip(aggregation, gradient)
    if aggregation.staleness is not None:
        coefficient *= aggregation.staleness.factor(0 if entry.base_step is None else ahead.step - entry.base_step)
    if aggregation.rounds:
        return replace(gradient, coefficient=coefficient)
    if aggregation.reduce.kind == "sum":
        coefficient *= entry.weight
    dense = [(slot, _within(scaled(array, coefficient), recipe, coefficient)) for slot, array in gradient.dense]
    rows = [
        (slot, Rows(r.indices, _within(scaled(r.values, coefficient), recipe, coefficient)))
        for slot, r in gradient.rows
    ]
    gradient = replace(gradient, dense=dense, rows=rows)
    return gradient if aggregation.noise_multiplier is None else noisy(recipe, gradient, 1, ahead.step + 1)


def _sign(entry: Contribution) -> float:
    """The pseudo-gradient is minus what the worker's parameters moved by."""
    return -1.0 if entry.payload == "deltas" else 1.0


def _clip(aggregation: Aggregation, gradient: Gradient) -> float:
    if aggregation.clip_norm is None:
        return 1.0
    arrays = [array for _, array in gradient.dense] + [rows.values.reshape(-1) for _, rows in gradient.rows]
    found = length(arrays)
    if found <= aggregation.clip_norm:
        return 1.0
    if found < np.inf:
        return aggregation.clip_norm / found
    # What is not finite is for a transform to mend: what it leaves counts. Of what is, the norm may be beyond float64.
    arrays = [np.where(np.isfinite(array), array, 0.0) for array in arrays]
    largest = max(float(np.max(np.abs(array), initial=0.0)) for array in arrays)
    scale = max(largest, 1.0)
    found = length([array / scale for array in arrays])
    return min(1.0, aggregation.clip_norm / scale / found) if found else 1.0


def _within(array: Array, recipe: Recipe, coefficient: float) -> Array:
    """`array`, which was multiplied by `coefficient`: a weight may bring it beyond its dtype."""
    return bounded(array, recipe) if abs(coefficient) > 1.0 else array


def scaled(array: Array, coefficient: float) -> Array:
    """coefficient · array, rounded once; `array` itself for 1."""
    if coefficient == 1.0:
        return array
    found = np.empty_like(array)
    flat, out = array.reshape(-1), found.reshape(-1)
    with np.errstate(all="ignore"):
        for start in range(0, flat.size, BLOCK):
            out[start : start + BLOCK] = coefficient * flat[start : start + BLOCK].astype(np.float64, copy=False)
    return found


# -- delay compensation ------------------------------------------------------------------------------------------------


@np.errstate(all="ignore")
def observe(recipe: Recipe, state: State, gradient: Gradient) -> None:
    """Takes g ⊙ g into the running mean of the adaptive compensation; rows that are not named stay."""
    wanted = recipe.aggregation.delay_compensation
    assert wanted is not None
    if state.delays.mean_square is None:
        state.delays.mean_square = np.zeros(recipe.layout.size, recipe.numpy_dtype)
    for slot, place, g in _pieces(gradient):
        home = _stretch(state.delays.mean_square, slot)
        wide = g.astype(np.float64).reshape(home[place].shape)
        mean = wanted.decay * home[place].astype(np.float64) + (1 - wanted.decay) * wide * wide
        # What a transform is to mend would be remembered for good.
        home[place] = np.where(np.isfinite(wide), np.minimum(mean, np.finfo(home.dtype).max), home[place])


def _compensated(
    recipe: Recipe, state: State, gradient: Gradient, worker: str, point: Array, *, sign: float
) -> Gradient:
    """g + λ g ⊙ g ⊙ (w − w_bak), of deltas the same of −delta, with the sign that they came with. w is the `point` that
    workers are given now, as w_bak was: some methods hand out others than the parameters.
    """
    wanted = recipe.aggregation.delay_compensation
    assert wanted is not None
    backup, mean_square = state.delays.backups[worker], state.delays.mean_square
    made: list[Array] = []
    with np.errstate(all="ignore"):
        for slot, place, g in _pieces(gradient):
            moved = _stretch(point, slot)[place].astype(np.float64) - _stretch(backup, slot)[place]
            wide = g.astype(np.float64).reshape(moved.shape)
            strength: Array | float = wanted.lambda_
            if wanted.adaptive:
                seen = 0.0 if mean_square is None else _stretch(mean_square, slot)[place].astype(np.float64)
                strength = wanted.lambda_ / np.sqrt(wanted.decay * seen + (1 - wanted.decay) * wide * wide + EPSILON)
            change = sign * (moved * wide) * strength * wide
            change = np.where(np.isnan(change), 0.0, change)  # 0 · infinity, where g ⊙ g is beyond float64
            made.append(bounded(wide + change, recipe).reshape(g.shape))
    count = len(gradient.dense)
    dense = [(slot, array) for (slot, _), array in zip(gradient.dense, made[:count], strict=True)]
    rows = [(slot, Rows(r.indices, v)) for (slot, r), v in zip(gradient.rows, made[count:], strict=True)]
    return replace(gradient, dense=dense, rows=rows)


def _pieces(gradient: Gradient) -> Sequence[tuple[Slot, Array | slice, Array]]:
    """Tensor, where in it, and the gradient there."""
    dense = [(slot, slice(None), array) for slot, array in gradient.dense]
    return [*dense, *((slot, rows.indices, rows.values) for slot, rows in gradient.rows)]


def _stretch(flat: Array, slot: Slot) -> Array:
    """The tensor's part of `flat`: its rows, (rows, …); of a number, itself."""
    part = flat[slot.start : slot.stop]
    return part if not slot.shape else part.reshape(slot.shape)


def bounded(array: Array, recipe: Recipe) -> Array:
    """In the session's dtype; what lies beyond it is brought to its end, unless a transform mends infinity."""
    dtype = recipe.numpy_dtype
    if not recipe.mends[1]:
        end = np.finfo(dtype).max
        array = np.clip(array, -end, end)
    with np.errstate(all="ignore"):
        return array.astype(dtype, copy=False)


# -- noise -------------------------------------------------------------------------------------------------------------


def noisy(recipe: Recipe, gradient: Gradient, count: int, step: int) -> Gradient:
    """With Gaussian noise for a mean, or sum, of `count` contributions that becomes `step`.

    Of a mean its deviation is z·S/n (arXiv:1710.06963). The norm is that of what comes out: the other is a secret.
    """
    aggregation = recipe.aggregation
    assert aggregation.noise_multiplier is not None
    assert aggregation.clip_norm is not None
    deviation = aggregation.noise_multiplier * aggregation.clip_norm
    if aggregation.reduce.kind == "mean":
        deviation /= count
    dense = [*gradient.dense, *((slot, unfolded(slot.shape, rows)) for slot, rows in gradient.rows)]
    dense.sort(key=lambda pair: pair[0].start)
    made = []
    for slot, array in dense:
        noise = deviation * gaussian(array.size, aggregation.seed or 0, step, slot.name)
        made.append((slot, bounded(array + noise, recipe)))
    return replace(gradient, dense=made, rows=[], norm=norm([array for _, array in made]))
