"""A session: what was asked for (Recipe), where it stands (State), and the one way in which that changes.

`check(entry)` says whether an entry can be applied, and changes nothing. `apply` takes what `check` let
through and cannot fail. The same entries in the same order give the same bits, whoever applies them.

The parameters of a state are never changed in place unless the caller says that nobody looks
(`fresh=False`): a step writes a new array, so whoever still sends the old one sends one whole step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from core.errors import (
    HessianRequired,
    InvalidRecipe,
    InvalidState,
    MissingGradient,
    NonFinite,
    ParamsHeld,
    ParamsNotHeld,
    ParamsRequired,
    ShapeMismatch,
)
from core.evaluate import Evaluator, Run, norm, run_ahead
from core.layout import Array, Layout, Rows, Slot, cast, check_rows, merge_rows
from core.optimizers import Dense, ElementWise
from core.optimizers.rule import Formula
from core.recipe import Recipe

PARAMS_AT_STEP_ZERO = "parameters can be given to a session whose client holds them at step 0 alone"


@dataclass(frozen=True, slots=True)
class Contribution:
    """A gradient: tensors by name, in any dtype that can be cast; and what some methods need beside it."""

    gradients: Mapping[str, Array | Rows]
    params: Mapping[str, Array] | None = None
    hessian: Array | None = None
    loss: float | None = None
    partial: bool = False


@dataclass(frozen=True, slots=True)
class NewParams:
    """The parameters are set, all of them."""

    params: Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class NewRecipe:
    """Hyperparameters, groups or transforms change; kind, shapes and dtype cannot."""

    recipe: Recipe


Entry: TypeAlias = Contribution | NewParams | NewRecipe


@dataclass(slots=True)
class State:
    """Where a session stands. All arrays are flat, in the session's dtype; matrices are (n, n)."""

    step: int
    params: Array | None
    slots: dict[str, Array]
    matrices: dict[str, Array] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        arrays = [*self.slots.values(), *self.matrices.values()]
        return sum(array.nbytes for array in arrays) + (0 if self.params is None else self.params.nbytes)

    def copy(self) -> "State":
        """A state of its own; `params` are shared, since they are never changed once others can see them."""
        slots = {name: array.copy() for name, array in self.slots.items()}
        return State(self.step, self.params, slots, {name: a.copy() for name, a in self.matrices.items()})


@dataclass(slots=True)
class Gradient:
    """A contribution that was checked: cast, in the session's dtype, finite."""

    dense: list[tuple[Slot, Array]]  # flat
    rows: list[tuple[Slot, Rows]]  # sorted, each row once
    params: Mapping[str, Array] | None
    hessian: Array | None
    norm: float


@dataclass(slots=True)
class FlatParams:
    """New parameters that were checked: one flat array (n,) of their own."""

    params: Array


Checked: TypeAlias = Gradient | FlatParams | NewRecipe


@dataclass(slots=True)
class Outcome:
    """What a step gave: the updates (n,) if they were asked for."""

    step: int
    updates: Array | None = None


class Session:
    """A recipe, a state, and `check` and `apply`."""

    def __init__(self, recipe: Recipe, state: State, evaluator: Evaluator) -> None:
        self.recipe = recipe
        self.state = state
        self.evaluator = evaluator

    @classmethod
    def new(cls, recipe: Recipe, params: Mapping[str, Array] | None, evaluator: Evaluator) -> "Session":
        """At step 0. `params` None: the client holds them. Raises TensorError."""
        flat = None if params is None else flatten(recipe, params, "value")
        return cls(recipe, State(0, flat, _initial(recipe), _initial_matrices(recipe)), evaluator)

    @property
    def layout(self) -> Layout:
        return self.recipe.layout

    # Checking

    def check(self, entry: Entry) -> Checked:
        """What `apply` takes. Raises a CoreError where the entry cannot be applied; changes nothing."""
        match entry:
            case Contribution():
                return self._check_contribution(entry)
            case NewParams():
                if self.state.params is None and self.state.step > 0:
                    raise ParamsNotHeld(PARAMS_AT_STEP_ZERO)
                return FlatParams(flatten(self.recipe, entry.params, "value"))
            case NewRecipe():
                return self._check_recipe(entry)

    def _check_contribution(self, entry: Contribution) -> Gradient:
        dtype = self.recipe.numpy_dtype
        dense: list[tuple[Slot, Array]] = []
        rows: list[tuple[Slot, Rows]] = []
        for name, array in entry.gradients.items():
            if isinstance(array, Rows):
                slot = self.layout.find(name)
                check_rows(slot, array)
                rows.append((slot, merge_rows(array, dtype)))
            else:
                dense.append((self.layout.fit(name, array), cast(array, dtype).reshape(-1)))
        if not entry.partial and len(entry.gradients) < len(self.layout.slots):
            raise MissingGradient(next(name for name in self.layout.names if name not in entry.gradients))
        dense.sort(key=_start)
        rows.sort(key=_start)
        gradient = Gradient(dense, rows, self._check_params(entry), self._check_hessian(entry), 0.0)
        gradient.norm = self._finite_norm(gradient)
        return gradient

    def _check_params(self, entry: Contribution) -> Mapping[str, Array] | None:
        if self.state.params is not None or "params" not in self.recipe.needs:
            if entry.params is not None and self.state.params is not None:
                raise ParamsHeld("this session holds the parameters itself: leave `params` out, or PUT them")
            return None
        if self.recipe.averaging is not None:
            raise ParamsRequired("averaging works on the parameters: give them to the session first, at step 0")
        if entry.params is None:
            raise ParamsRequired(
                f"{self.recipe.optimizer.kind} works on the parameters, which this session's client holds: "
                "send them with the step, as `params`"
            )
        found = {}
        for name in entry.gradients:
            if name not in entry.params:
                raise MissingGradient(name, "value under `params`")
        for name, array in entry.params.items():
            self.layout.fit(name, array)
            found[name] = _finite(name, cast(array, self.recipe.numpy_dtype)).reshape(-1)
        return found

    def _check_hessian(self, entry: Contribution) -> Array | None:
        if entry.hessian is None:
            if "hessian" in self.recipe.needs:
                raise HessianRequired(f"{self.recipe.optimizer.kind} needs the Hessian: send it as `hessian`")
            return None
        expected = (self.layout.size, self.layout.size)
        if entry.hessian.shape != expected:
            raise ShapeMismatch("hessian", expected, entry.hessian.shape)
        return _finite("hessian", cast(entry.hessian, np.dtype(np.float64)))

    def _finite_norm(self, gradient: Gradient) -> float:
        arrays = [array for _, array in gradient.dense] + [rows.values.reshape(-1) for _, rows in gradient.rows]
        found = norm(arrays)
        if not np.isfinite(found):  # or the squares of a float64 gradient are too large, which is no fault
            for slot, array in gradient.dense:
                _finite(slot.name, array)
            for slot, rows in gradient.rows:
                _finite(slot.name, rows.values)
        return found

    def _check_recipe(self, entry: NewRecipe) -> NewRecipe:
        old, new = self.recipe, entry.recipe
        if new.optimizer.kind != old.optimizer.kind or new.optimizer.dense != old.optimizer.dense:
            raise InvalidRecipe("/optimizer/kind", "the kind of a running session's optimizer cannot change")
        if (new.layout, new.dtype, new.averaging) != (old.layout, old.dtype, old.averaging):
            raise InvalidRecipe("/shapes", "shapes, dtype and averaging of a running session cannot change")
        return entry

    # Applying

    def apply(self, checked: Checked, *, want_updates: bool = False, fresh: bool = True) -> Outcome:
        """The only way a state changes. `fresh` False may write the new parameters over the old ones."""
        state = self.state
        match checked:
            case Gradient():
                return self._step(checked, want_updates=want_updates, fresh=fresh)
            case FlatParams():
                state.params = checked.params
            case NewRecipe():
                self.recipe = checked.recipe
                initial = _initial(self.recipe, keep=state.slots)
                state.slots = {name: initial[name] for name in self.recipe.slots}
        return Outcome(state.step)

    def _step(self, gradient: Gradient, *, want_updates: bool, fresh: bool) -> Outcome:
        state, t = self.state, self.state.step + 1
        held = state.params
        moving = len(gradient.dense) == len(self.layout.slots) and None not in self.recipe.choices.values()
        if held is None or want_updates:
            out = np.empty(self.layout.size, self.recipe.numpy_dtype)
            if not moving:
                out.fill(-0.0)  # what can be added to a parameter without changing a bit; 0.0 would turn -0.0
        else:
            out = np.empty_like(held) if fresh else held
            if fresh and not moving:
                out[...] = held
        add = held is not None and not want_updates
        if self.recipe.optimizer.dense:
            self._apply_dense(gradient, t, out, add=add)
        else:
            self._apply_elements(gradient, t, out, add=add)
        if held is not None:
            if want_updates:
                with np.errstate(all="ignore"):
                    state.params = np.add(held, out, out=None if fresh else held)
            else:
                state.params = out
        state.step = t
        if self.recipe.averaging is not None and state.params is not None:
            self.recipe.averaging.include(state.slots["average"], state.params, t)
        return Outcome(t, None if add else out)

    def _apply_elements(self, gradient: Gradient, t: int, out: Array, *, add: bool) -> None:
        resolved: dict[int, tuple[ElementWise, tuple[float, ...]]] = {}
        pieces: list[tuple[Slot, Array | Rows]] = [*gradient.dense, *gradient.rows]
        for slot, g in pieces:
            choice = self.recipe.choices[slot.name]
            if choice is None:
                continue
            if choice not in resolved:
                rule = self.recipe.variants[choice]
                assert isinstance(rule, ElementWise)
                resolved[choice] = rule, rule.at(t).coefficients(t)
            rule, coefficients = resolved[choice]
            run = self._run(rule, slot, gradient, out)
            if isinstance(g, Rows):
                self._apply_rows(rule, coefficients, slot, g, run, add=add)
            else:
                self._evaluate(rule, coefficients, run._replace(g=g), add=add)

    def _run(self, rule: ElementWise, slot: Slot, gradient: Gradient, out: Array) -> Run:
        """The stretches of state and result that belong to `slot`; the gradient is still to come."""
        flat = slice(slot.start, slot.stop)
        target, params = out[flat], None
        if self.state.params is not None:
            params = target if self.state.params is out else self.state.params[flat]
        elif gradient.params is not None:
            params = gradient.params.get(slot.name)
        slots = [self.state.slots[name][flat] for name in rule.slots]
        return Run(target, params, slots, target)

    def _evaluate(self, rule: ElementWise, coefficients: Sequence[float], run: Run, *, add: bool) -> None:
        needs_params = "params" in rule.needs
        self.evaluator.run(rule.update, run, coefficients, needs_params=needs_params, add=add)

    def _apply_rows(
        self, rule: ElementWise, coefficients: Sequence[float], slot: Slot, rows: Rows, run: Run, *, add: bool
    ) -> None:
        if not rule.lazy_rows:
            self._evaluate(rule, coefficients, run._replace(g=_whole(slot, rows)), add=add)
            return
        if not rows.values.size:
            return
        # Gathered, stepped and scattered back, so that the work is that of the rows named.
        table = (slot.shape[0], -1)
        picked = [array.reshape(table)[rows.indices] for array in run.slots]
        params = None if run.params is None else run.params.reshape(table)[rows.indices].reshape(-1)
        out = np.empty(rows.values.size, rows.values.dtype)
        flat = [array.reshape(-1) for array in picked]
        self._evaluate(rule, coefficients, Run(rows.values.reshape(-1), params, flat, out), add=add)
        for array, new in zip(run.slots, picked, strict=True):
            array.reshape(table)[rows.indices] = new
        run.out.reshape(table)[rows.indices] = out.reshape(len(rows.indices), -1)

    def _apply_dense(self, gradient: Gradient, t: int, out: Array, *, add: bool) -> None:
        tensors = {slot.name: g for slot, g in gradient.dense}
        for slot, rows in gradient.rows:
            tensors[slot.name] = _whole(slot, rows)
        live = self.recipe.live(list(tensors))
        if not live:
            return
        rates = [variant.at(t).rate(t) for variant in self.recipe.variants]
        g = np.concatenate([tensors[slot.name] for slot, _ in live]).astype(np.float64)
        lr = np.concatenate([np.full(slot.stop - slot.start, rates[choice]) for slot, choice in live])
        where = np.concatenate([np.arange(slot.start, slot.stop) for slot, _ in live])
        block = np.ix_(where, where)
        matrices = {name: matrix[block] for name, matrix in self.state.matrices.items()}
        hessian = None if gradient.hessian is None else gradient.hessian[block]
        method = self.recipe.optimizer.at(t)
        assert isinstance(method, Dense)
        with np.errstate(all="ignore"):
            update = method.step(g, matrices, hessian, lr).astype(out.dtype)
            for name, matrix in matrices.items():
                self.state.matrices[name][block] = matrix
            held = self.state.params
            out[where] = held[where] + update if add and held is not None else update

    # Looking

    def next_point(self) -> Array:
        """The point (n,) at which the next gradient is to be taken. Raises ParamsNotHeld."""
        state = self.state
        if state.params is None:
            raise ParamsNotHeld("this session's client holds the parameters")
        ahead = self._ahead()
        if not ahead:
            return state.params
        point = state.params.copy()
        t = state.step + 1
        for slot, choice in self.recipe.live():
            if choice in ahead:
                rule, formula = ahead[choice]
                flat = slice(slot.start, slot.stop)
                slots = [state.slots[name][flat] for name in rule.slots]
                point[flat] = run_ahead(formula, state.params[flat], slots, rule.at(t).coefficients(t))
        return point

    def _ahead(self) -> dict[int, tuple[ElementWise, Formula]]:
        rules = [(i, rule) for i, rule in enumerate(self.recipe.variants) if isinstance(rule, ElementWise)]
        return {i: (rule, rule.ahead) for i, rule in rules if rule.ahead is not None}

    def final_point(self) -> Array:
        """The point (n,) to use as the result: the average where there is one. Raises ParamsNotHeld."""
        state = self.state
        if state.params is None:
            raise ParamsNotHeld("this session's client holds the parameters")
        averaging = self.recipe.averaging
        if averaging is None:
            return state.params
        point = averaging.result(state.slots["average"], state.params, state.step)
        return point.copy() if point is state.slots["average"] else point

    def rate(self, t: int | None = None) -> float:
        """The learning rate of step t, of the next one if left out."""
        t = self.state.step + 1 if t is None else t
        return self.recipe.optimizer.at(t).rate(t)


def _whole(slot: Slot, rows: Rows) -> Array:
    """A row-sparse tensor as a flat one, zero where no row is named."""
    whole = np.zeros(slot.shape, rows.values.dtype)
    whole[rows.indices] = rows.values
    return whole.reshape(-1)


def _start(pair: tuple[Slot, Any]) -> int:
    return pair[0].start


def _finite(name: str, array: Array) -> Array:
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
        flat[slot.start : slot.stop] = _finite(slot.name, cast(tensors[slot.name], recipe.numpy_dtype)).reshape(-1)
    return flat


def _initial(recipe: Recipe, keep: Mapping[str, Array] | None = None) -> dict[str, Array]:
    """Every slot as it is before the first step; those of `keep` as they are."""
    found = {} if keep is None else dict(keep)
    for name, value in recipe.slots.items():
        if name not in found:
            found[name] = np.full(recipe.layout.size, value, recipe.numpy_dtype)
            for slot, choice in recipe.live():
                variant = recipe.variants[choice]
                if name in variant.slots:
                    found[name][slot.start : slot.stop] = variant.initial(name)
    return found


def _initial_matrices(recipe: Recipe) -> dict[str, Array]:
    size, dtype = recipe.layout.size, recipe.numpy_dtype
    return {name: np.eye(size, dtype=dtype) * dtype.type(value) for name, value in recipe.matrices.items()}


# A state as named tensors, and back: the form of checkpoints and snapshots.


def tensors_of(recipe: Recipe, state: State) -> dict[str, Array]:
    """`w` (where held), `w:m`, `w:v`, … and `:G` for a matrix: views, in their shapes."""
    named: dict[str, Array] = {}
    if state.params is not None:
        named.update(recipe.layout.views(state.params))
    for slot, flat in state.slots.items():
        named.update({f"{name}:{slot}": view for name, view in recipe.layout.views(flat).items()})
    named.update({f":{name}": matrix for name, matrix in state.matrices.items()})
    return named


def state_of(recipe: Recipe, step: int, tensors: Mapping[str, Array]) -> State:
    """The state that `tensors_of` named, in arrays of its own.

    At step 0 a slot may be left out: it is then as it is before the first step. Raises InvalidState.
    """
    state = State(step, None, _initial(recipe), _initial_matrices(recipe))
    homes: dict[str, Array] = {f":{name}": matrix for name, matrix in state.matrices.items()}
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
