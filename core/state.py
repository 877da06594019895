"""Where a session stands: its arrays, how they begin, and how they are named in a file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from core.aggregation.ledger import Ledger
from core.aggregation.rounds import DELAY, ROUND, Delays, Round
from core.bounds import check_number
from core.errors import InvalidRecipe, InvalidState
from core.layout import BF16, Array
from core.recipe import Recipe

# What stands for the parameters among the names of slots.
PARAMS = ""


@dataclass(slots=True)
class State:
    """`step` counts the gradients taken, `moves` the updates made of them; they differ where a method takes several
    gradients for one. Parameters and slots are flat, (n,). `own` has what is of another shape, by its whole name.
    `ledger`, `round` and `delays` are of the workers that contribute, and of what they sent that is no step yet.
    """

    step: int
    params: Array | None
    slots: dict[str, Array]
    own: dict[str, Array] = field(default_factory=dict)
    moves: int = 0
    ledger: Ledger = field(default_factory=Ledger)
    round: Round = field(default_factory=Round)
    delays: Delays = field(default_factory=Delays)

    @property
    def nbytes(self) -> int:
        arrays = [*self.slots.values(), *self.own.values()]
        if self.ledger.workers or self.ledger.received:  # asked after every step, and most sessions have none
            arrays += self.contributed.values()
        return sum(array.nbytes for array in arrays) + (0 if self.params is None else self.params.nbytes)

    @property
    def contributed(self) -> dict[str, Array]:
        """The arrays of the open round and of the workers, by their whole names."""
        return self.round.arrays | self.delays.arrays

    def copy(self) -> "State":
        """A state of its own; `params` are shared, since they are never changed once others can see them."""
        slots = {name: array.copy() for name, array in self.slots.items()}
        own = {name: array.copy() for name, array in self.own.items()}
        workers = self.ledger.copy(), self.round.copy(), self.delays.copy()
        return State(self.step, self.params, slots, own, self.moves, *workers)


@np.errstate(over="ignore")
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


@np.errstate(over="ignore")
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


def carried(old: Recipe, new: Recipe, state: State) -> State:
    """What `state`, which is one of `old`, brings along where `new` takes over.

    The rest begins anew: a plateau that starts from another value or belongs to something else now, and a transform
    that keeps other arrays than before, since what it keeps belongs together.
    """
    before = dict(zip(old.transform_names, old.transforms, strict=True))
    begun = set()
    for name, transform in zip(new.transform_names, new.transforms, strict=True):
        known = before.get(name, transform)
        if (known.slots, known.own().keys()) != (transform.slots, transform.own().keys()):
            begun.add(name)
    slots = {name: array for name, array in state.slots.items() if name.rpartition(".")[0] not in begun}
    own = {name: array for name, array in state.own.items() if _owner(name) not in begun | {"plateau"}}
    for path, plateau in new.plateaus.items():
        origin = _origin(old, new, path)
        known_plateau = old.plateaus.get(origin)
        if known_plateau is not None and known_plateau.start() == plateau.start():
            own[f":plateau.{path}"] = state.own[f":plateau.{origin}"].copy()  # two groups may go on from the same
    return State(state.step, state.params, slots, own, state.moves)  # workers and rounds go on as they are


def _owner(name: str) -> str:
    """Of an array that belongs to no tensor: the transform that keeps it, or "plateau"."""
    if not name.startswith(":"):
        return ""
    return "plateau" if name.startswith(":plateau.") else name[1:].rpartition(".")[0]


def _origin(old: Recipe, new: Recipe, path: str) -> str:
    """Where in `old` the hyperparameter was that is at `path` in `new`: groups go by what they match."""
    family, _, rest = path.partition(".")
    index, _, name = rest.partition(".")
    if family == "groups":
        there, here = [group.match for group in old.groups], new.groups[int(index)].match
    elif family == "transforms":
        there, here = old.transform_names, new.transform_names[int(index)]
    else:
        return path
    return f"{family}.{there.index(here)}.{name}" if here in there else ""


def _check_own(recipe: Recipe, own: Mapping[str, Array]) -> None:
    """Raises InvalidState for numbers that the rules cannot have left there, and might not be able to go on from."""
    for name, spec in recipe.own.items():
        if not spec.holds(own[name]):
            raise InvalidState(f"{name!r} holds a value that it cannot have")
    for path, plateau in recipe.plateaus.items():
        name = f":plateau.{path}"
        try:
            check_number(plateau.value(own[name]), recipe.bounds_of(path), name)
        except InvalidRecipe as error:
            raise InvalidState(f"{name!r} holds a value that it cannot have: {error.reason}") from None


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
    return named | state.own | state.contributed


def workers_of(state: State) -> dict[str, Any]:
    """What is known of workers and the open round beside their arrays, as JSON values; empty if nothing is."""
    return {name: found for name in ("ledger", "round") if (found := getattr(state, name).describe())}


def state_of(
    recipe: Recipe,
    step: int,
    tensors: Mapping[str, Array],
    moves: int | None = None,
    workers: Mapping[str, Any] = MappingProxyType({}),
    *,
    adopt: bool = False,
) -> State:
    """The state that `tensors_of` and `workers_of` named, in arrays of its own; `moves` are as many as steps if left
    out. At step 0 a slot may be left out: it is then as it is before the first step. Raises InvalidState.

    `adopt`: the tensors are nobody else's. Those of a slot that have one array to themselves, in which they lie one
    after the other, are not copied: the state takes that array.
    """
    tensors, shared = _parted(tensors)
    moves = step if moves is None else moves
    if not 0 <= moves <= step:
        raise InvalidState(f"{moves} updates cannot have come of {step} gradients")
    taken = _adopted(recipe, tensors) if adopt else {}
    state = State(step, None, initial_slots(recipe, keep=taken), initial_own(recipe), moves)
    homes: dict[str, Array] = dict(state.own)
    for slot, flat in state.slots.items():
        homes.update({f"{name}:{slot}": view for name, view in recipe.layout.views(flat).items()})
    if any(name in tensors for name in recipe.layout.names):
        state.params = taken[PARAMS] if PARAMS in taken else np.empty(recipe.layout.size, recipe.numpy_dtype)
        homes.update(recipe.layout.views(state.params))
    in_place = {_name(tensor, slot) for slot in taken for tensor in recipe.layout.names}
    for name, home in homes.items():
        found = tensors.get(name)
        if found is None:
            if step == 0 and ":" in name:
                continue
            raise InvalidState(f"the state has no tensor {name!r}")
        if found.dtype != home.dtype or found.shape != home.shape:
            raise InvalidState(f"{name!r} is {found.dtype} {list(found.shape)}, not {home.dtype} {list(home.shape)}")
        if name not in in_place:
            home[...] = found
    _check_own(recipe, state.own)
    _read_workers(recipe, state, shared, workers)
    unknown = sorted(set(tensors) - set(homes))
    if unknown:
        raise InvalidState(f"the state has a tensor {unknown[0]!r} that the recipe does not know")
    return state


def _adopted(recipe: Recipe, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """By slot, and PARAMS, the flat arrays (n,) that are filled by the tensors as they lie there."""
    found: dict[str, Array] = {}
    for name in (PARAMS, *recipe.slots):
        dtype = recipe.dtype_of(name)
        parts = [tensors.get(_name(tensor, name)) for tensor in recipe.layout.names]
        flat = _flat([part for part in parts if part is not None and part.dtype == dtype])
        if flat is not None and flat.nbytes == recipe.layout.size * dtype.itemsize:
            found[name] = flat.view(dtype)
    return found


def _name(tensor: str, slot: str) -> str:
    return tensor if slot == PARAMS else f"{tensor}:{slot}"


def _flat(parts: Sequence[Array]) -> Array | None:
    """The bytes of `parts`, which one after the other are all of an array; None where they are not."""
    whole = parts[0].base if parts else None
    if not isinstance(whole, np.ndarray) or not whole.flags.writeable or not whole.flags.c_contiguous:
        return None
    start = at = whole.ctypes.data
    for part in parts:
        if part.base is not whole or part.ctypes.data != at or not part.flags.c_contiguous:
            return None
        at += part.nbytes
    return whole.reshape(-1).view(np.uint8) if at == start + whole.nbytes else None


def _parted(tensors: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """What belongs to the recipe's own state, and what to the workers."""
    shared = {name: array for name, array in tensors.items() if name.startswith((ROUND, DELAY))}
    return {name: array for name, array in tensors.items() if name not in shared}, shared


def _read_workers(recipe: Recipe, state: State, arrays: Mapping[str, Array], text: Mapping[str, Any]) -> None:
    """Raises InvalidState."""
    size, dtype, aggregation = recipe.layout.size, recipe.numpy_dtype, recipe.aggregation
    copies = {name: array.copy() for name, array in arrays.items()}
    try:
        state.ledger = Ledger.read(text.get("ledger", {}))
        state.round = Round.read(text.get("round", {}), {n: a for n, a in copies.items() if n.startswith(ROUND)})
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise InvalidState(f"what is known of the workers cannot be read: {error!r}") from None
    state.delays = Delays.read(
        {name: a for name, a in copies.items() if name.startswith(DELAY)}, size, dtype, aggregation.backups
    )
    state.round.check(size, dtype, {slot.name: slot.shape[0] if slot.shape else None for slot in recipe.layout})
    running, kept = state.round.total is not None, len(state.round.kept)
    received = state.ledger.received
    expected = (received > 0, 0) if aggregation.reduce.running else (False, received)
    if (running, kept) != expected or (received and not aggregation.rounds) or received > aggregation.needed:
        raise InvalidState("the open round has other contributions than its ledger says")
    if state.delays.arrays and aggregation.delay_compensation is None:
        raise InvalidState("there are backups of workers, and no delay is to be compensated")
    beside = {":loss", ":hessian", *(f":hessian_diagonal:{name}" for name in recipe.layout.names)}
    if state.round.weights.keys() - beside - set(recipe.layout.names):
        raise InvalidState("the open round weighs what this session has not")
    if not received and (state.round.arrays or state.round.describe()):
        raise InvalidState("there is something of an open round to which nobody has contributed")
    lacking = unfinished(recipe, state)
    if lacking:
        raise InvalidState(f"the open round has {lacking}")


def unfinished(recipe: Recipe, state: State) -> str:
    """What keeps the open round from becoming a step of `recipe`, as "no gradient of 'w'"; empty if nothing does.

    Each contribution was checked against the recipe of its time, so it is a recipe that took over since, or a file.
    """
    round_, needs = state.round, recipe.needs
    if not state.ledger.received:
        return ""
    running, t = recipe.aggregation.reduce.running, state.moves + 1
    live = [slot.name for slot, _ in recipe.live() if not running or recipe.whole_only or slot.name in round_.weights]
    due = "hessian_diagonal" in needs and any(variant.at(t).due(t) for variant in recipe.variants)
    weights = round_.weights
    lacks = {
        "no gradient of a tensor": running and not weights.keys() >= set(live),
        "no loss": ":loss" not in weights and ("loss" in needs or round_.loss != 0 or bool(round_.losses)),
        "no Hessian": ("hessian" in needs or round_.hessian is not None)
        and not _has(weights, round_.hessian, ":hessian"),
        "no diagonal of the Hessian": due
        and not all(_has(weights, round_.diagonal, f":hessian_diagonal:{name}") for name in live),
        "no parameters": "params" in needs and state.params is None and round_.params is None,
        "numbers that are not finite": not all(
            _bears(recipe, array) for array in [*round_.kept, *_there(round_.total)]
        ),
    }
    return next((what for what, lacking in lacks.items() if lacking), "")


def _has(weights: Mapping[str, float], array: Array | None, name: str) -> bool:
    return array is not None and name in weights


def _there(array: Array | None) -> list[Array]:
    return [] if array is None else [array]


def _bears(recipe: Recipe, array: Array) -> bool:
    """Whether what is not finite in `array` is mended by a transform."""
    nan, infinite = recipe.mends
    return (nan or not np.isnan(array).any()) and (infinite or not np.isinf(array).any())
