"""Where a session stands: its arrays, how they begin, and how they are named in a file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from core.errors import InvalidState
from core.layout import BF16, Array
from core.recipe import Recipe


@dataclass(slots=True)
class State:
    """`step` counts the gradients taken, `moves` the updates made of them; they differ where a method takes several
    gradients for one. Parameters and slots are flat, (n,). `own` has what is of another shape, by its whole name.
    """

    step: int
    params: Array | None
    slots: dict[str, Array]
    own: dict[str, Array] = field(default_factory=dict)
    moves: int = 0

    @property
    def nbytes(self) -> int:
        arrays = [*self.slots.values(), *self.own.values()]
        return sum(array.nbytes for array in arrays) + (0 if self.params is None else self.params.nbytes)

    def copy(self) -> "State":
        """A state of its own; `params` are shared, since they are never changed once others can see them."""
        slots = {name: array.copy() for name, array in self.slots.items()}
        own = {name: array.copy() for name, array in self.own.items()}
        return State(self.step, self.params, slots, own, self.moves)


def initial_slots(recipe: Recipe, keep: Mapping[str, Array] | None = None) -> dict[str, Array]:
    """Every slot as it is before the first step; those of `keep` as they are."""
    found: dict[str, Array] = {}
    for name, value in recipe.slots.items():
        dtype = recipe.dtype_of(name)
        if keep is not None and name in keep and keep[name].dtype == dtype:
            found[name] = keep[name]
            continue
        found[name] = _filled((recipe.layout.size,), value, dtype)
        for slot, choice in recipe.live():
            variant = recipe.variants[choice]
            if name in variant.slots and variant.initial(name) != value:
                found[name][slot.start : slot.stop] = _filled((slot.stop - slot.start,), variant.initial(name), dtype)
    return found


def initial_own(recipe: Recipe, keep: Mapping[str, Array] | None = None) -> dict[str, Array]:
    """Every other array as it is before the first step; those of `keep` as they are."""
    found: dict[str, Array] = {}
    for name, own in recipe.own.items():
        if keep is not None and name in keep and keep[name].shape == own.shape:
            found[name] = keep[name]
        elif own.square:
            dtype = recipe.own_dtype(own)
            found[name] = np.eye(own.shape[0], dtype=dtype) * dtype.type(own.fill)
        else:
            found[name] = np.full(own.shape, own.fill, recipe.own_dtype(own))
    for path, plateau in recipe.plateaus.items():
        name = f":plateau.{path}"
        if keep is None or name not in keep:
            found[name][...] = plateau.start()
    return found


def _filled(shape: tuple[int, ...], value: float, dtype: np.dtype[Any]) -> Array:
    if dtype != BF16:
        return np.full(shape, value, dtype)
    words = np.full(shape, value, np.float32).view(np.uint32) >> np.uint32(16)
    return words.astype("<u2").view(BF16)


def tensors_of(recipe: Recipe, state: State) -> dict[str, Array]:
    """`w` (where held), `w:m`, `w:v`, … and `:d` for what belongs to no tensor: views, in their shapes."""
    named: dict[str, Array] = {}
    if state.params is not None:
        named.update(recipe.layout.views(state.params))
    for slot, flat in state.slots.items():
        named.update({f"{name}:{slot}": view for name, view in recipe.layout.views(flat).items()})
    return named | state.own


def state_of(recipe: Recipe, step: int, tensors: Mapping[str, Array], moves: int | None = None) -> State:
    """The state that `tensors_of` named, in arrays of its own; `moves` are as many as steps if left out.

    At step 0 a slot may be left out: it is then as it is before the first step. Raises InvalidState.
    """
    moves = step if moves is None else moves
    if not 0 <= moves <= step:
        raise InvalidState(f"{moves} updates cannot have come of {step} gradients")
    state = State(step, None, initial_slots(recipe), initial_own(recipe), moves)
    homes: dict[str, Array] = dict(state.own)
    for slot, flat in state.slots.items():
        homes.update({f"{name}:{slot}": view for name, view in recipe.layout.views(flat).items()})
    if any(name in tensors for name in recipe.layout.names):
        state.params = np.empty(recipe.layout.size, recipe.numpy_dtype)
        homes.update(recipe.layout.views(state.params))
    for name, home in homes.items():
        found = tensors.get(name)
        if found is None:
            if step == 0 and ":" in name:
                continue
            raise InvalidState(f"the state has no tensor {name!r}")
        if found.dtype != home.dtype or found.shape != home.shape:
            raise InvalidState(f"{name!r} is {found.dtype} {list(found.shape)}, not {home.dtype} {list(home.shape)}")
        home[...] = found
    unknown = sorted(set(tensors) - set(homes))
    if unknown:
        raise InvalidState(f"the state has a tensor {unknown[0]!r} that the recipe does not know")
    return state
