"""How a checked gradient becomes an update: through the transforms, the wrappers and the method.

    gradient -> transforms, in order -> wrappers' `before` -> the method's rule -> wrappers' `after` -> parameters

Each of them may hold the step back: the gradient was taken in, and the parameters stay. Nothing here can fail on a
gradient that was checked.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from core.bfloat16 import random_words, round_randomly, widen
from core.contributions import Gradient
from core.evaluate import Evaluator, Run
from core.layout import BF16, Array, Rows, Slot, unfolded
from core.optimizers import ElementWise, Optimizer, TensorWise, Whole
from core.optimizers.rule import Beside
from core.optimizers.wrappers import Wrapper
from core.recipe import Recipe
from core.state import State
from core.transforms import Piece, Transform

# Slots in bfloat16 are widened so many elements at a time. The random words begin anew with each part: with another
# number a replay would give other bits.
COMPACT_PART = 262_144
# The least share of elements that a cautious update is taken to keep, so that it never grows without end.
LEAST_KEPT = 1e-3


def plateau_values(recipe: Recipe, state: State) -> dict[str, float]:
    """The hyperparameters that look at the loss, by path, as they stand."""
    return {path: plateau.value(state.own[f":plateau.{path}"]) for path, plateau in recipe.plateaus.items()}


def resolved(recipe: Recipe, values: Mapping[str, float], variant: int, t: int) -> Any:
    """A variant of the method with the values that its schedules have at step t."""
    method = recipe.variants[variant]
    if not recipe.schedules:  # as with most sessions, at every step of which this is asked
        return method
    if values:
        own = {path: values.get(recipe.path_of(variant, path)) for path, _ in method.schedules()}
        return method.at(t, {path: value for path, value in own.items() if value is not None})
    return method.at(t)


def wrappers_at(recipe: Recipe, values: Mapping[str, float], t: int) -> list[Wrapper]:
    """The wrappers, outermost first, with the values that their schedules have at step t."""
    return [wrapper.at(t, _below(values, "base." * depth)) for depth, wrapper in enumerate(recipe.wrappers)]


def own_of(state: State, name: str, transform: Transform) -> dict[str, Array]:
    """What the state has of a transform, called `name` there, beside its slots."""
    return {key: state.own[f":{name}.{key}"] for key in transform.own()}


def _below(values: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {path.removeprefix(prefix): value for path, value in values.items() if path.startswith(prefix)}


def whole(piece: Piece) -> Array:
    """The gradient of a tensor, flat; of a row-sparse one, zero where no row is named."""
    if piece.rows is None:
        return piece.g
    return unfolded(piece.shape, Rows(piece.rows, piece.g.reshape(len(piece.rows), *piece.shape[1:])))


class Move:
    """One gradient on its way into a state."""

    def __init__(self, recipe: Recipe, state: State, evaluator: Evaluator, gradient: Gradient) -> None:
        self.recipe = recipe
        self.state = state
        self.evaluator = evaluator
        self.gradient = gradient
        self.t = state.moves + 1
        self.values = plateau_values(recipe, state) if recipe.plateaus else {}
        self.placed: list[tuple[slice, Array]] = []  # parameters that a transform put somewhere after the update
        self.pieces = self._pieces()

    def _pieces(self) -> list[Piece]:
        found = []
        for slot, g in self.gradient.dense:
            if self.recipe.choices[slot.name] is not None:
                found.append(Piece(slot.name, slot.shape, g, None, self._params(slot)))
        for slot, rows in self.gradient.rows:
            if self.recipe.choices[slot.name] is not None:
                found.append(Piece(slot.name, slot.shape, rows.values.reshape(-1), rows.indices, self._params(slot)))
        return found

    def _params(self, slot: Slot) -> Array | None:
        if self.state.params is not None:
            return self.state.params[slot.start : slot.stop]
        return None if self.gradient.params is None else self.gradient.params.get(slot.name)

    def _flat(self, name: str) -> slice:
        slot = self.recipe.layout.slots[name]
        return slice(slot.start, slot.stop)

    # The way

    def take(self, *, want_updates: bool, fresh: bool) -> tuple[Array | None, bool]:
        """Changes the state; gives the updates (n,), where they are wanted or there are no parameters, and whether
        the parameters were moved.
        """
        recipe, state = self.recipe, self.state
        held = state.params
        with np.errstate(all="ignore"):
            moved = (not recipe.transforms or self._transform()) and (not recipe.wrappers or self._before())
            add = held is not None and not want_updates and not recipe.wrappers and not recipe.follows
            out = self._out(add=add, fresh=fresh) if moved else None
            moved = out is not None and self._run(out, add=add)
            if out is None or not moved:
                return (None if held is not None and not want_updates else self._nothing()), False
            if not add:
                self._after(out)
        if add:
            state.params = out
            return None, True
        if held is not None:
            with np.errstate(all="ignore"):
                state.params = np.add(held, out, out=None if fresh else held)
            for flat, p in self.placed:  # not p + (projected - p), which may lie just outside
                state.params[flat] = p
        return (out if held is None or want_updates else None), True

    def _nothing(self) -> Array:
        """What can be added to parameters without changing a bit; 0.0 would turn -0.0."""
        return np.full(self.recipe.layout.size, -0.0, self.recipe.numpy_dtype)

    def _out(self, *, add: bool, fresh: bool) -> Array:
        size, held = self.recipe.layout.size, self.state.params
        moving = sum(piece.rows is None for piece in self.pieces) == len(self.recipe.layout.slots)
        if add and held is not None:
            if not fresh:
                return held
            return self.evaluator.empty(size, held.dtype) if moving else held.copy()
        return self.evaluator.empty(size, self.recipe.numpy_dtype) if moving else self._nothing()

    def _transform(self) -> bool:
        state = self.state
        for name, transform in zip(self.recipe.transform_names, self._transforms, strict=True):
            for piece in self.pieces:
                if piece.rows is not None and not transform.keeps_rows:
                    piece.g, piece.rows = whole(piece), None
                flat = self._flat(piece.name)
                piece.slots = {slot: state.slots[f"{name}.{slot}"][flat] for slot in transform.slots}
            if not transform.change(state.step + 1, self.pieces, own_of(state, name, transform)):
                return False
        return True

    @cached_property
    def _transforms(self) -> list[Transform]:
        """In their order, at this step."""
        transforms = enumerate(self.recipe.transforms)
        return [transform.at(self.t, _below(self.values, f"transforms.{i}.")) for i, transform in transforms]

    def _before(self) -> bool:
        for wrapper in self._wrappers:
            if not wrapper.holds_back:
                continue
            slots = []
            for piece in self.pieces:
                piece.g, piece.rows = whole(piece), None
                flat = self._flat(piece.name)
                slots.append({name: self.state.slots[name][flat] for name in wrapper.adds})
                if piece.p is not None:
                    slots[-1]["p"] = piece.p
            own = {name: self.state.own[f":{name}"] for name in wrapper.own()}
            if not wrapper.before([piece.g for piece in self.pieces], slots, own):
                return False
        return True

    @cached_property
    def _wrappers(self) -> list[Wrapper]:
        """Outermost first, at this step."""
        return wrappers_at(self.recipe, self.values, self.t)

    def _run(self, out: Array, *, add: bool) -> bool:
        family = self.recipe.method.family
        if family == "elements":
            self._elements(out, add=add)
        elif family == "tensors":
            self._tensors(out, add=add)
        else:
            return self._vector(out, add=add)
        return True

    def _after(self, u: Array) -> None:
        if self.recipe.follows:
            self._follow(u)
        wrappers = [wrapper for wrapper in reversed(self._wrappers) if wrapper.moves]
        for wrapper in wrappers:
            for piece in self.pieces:
                self._wrap_up(wrapper, piece, u)
        if self.recipe.follows and wrappers:  # where they moved to is in the set but for rounding
            self._follow(u)

    def _wrap_up(self, wrapper: Wrapper, piece: Piece, u: Array) -> None:
        """What the wrapper makes of the update of a tensor, or of the rows of it that had a gradient."""
        flat = self._flat(piece.name)
        state = {name: self.state.slots[name][flat] for name in wrapper.adds}
        if piece.rows is None:
            wrapper.after(self.t, u[flat], state)
            return
        table = (piece.shape[0], -1) if piece.g.size else piece.shape
        tables = {name: array.reshape(table) for name, array in state.items()}
        picked = {name: array[piece.rows] for name, array in tables.items()}
        part = u[flat].reshape(table)[piece.rows]
        wrapper.after(self.t, part, picked)
        u[flat].reshape(table)[piece.rows] = part
        for name, array in tables.items():
            array[piece.rows] = picked[name]

    def _follow(self, u: Array) -> None:
        """The transforms that change the parameters after the update."""
        followers = [transform for transform in self._transforms if transform.follows]
        self.placed = []
        for piece in self.pieces:
            if piece.p is None:
                continue
            flat = self._flat(piece.name)
            p = piece.p + u[flat]
            for transform in followers:
                p = transform.after(piece.shape, p)
            u[flat] = p - piece.p
            self.placed.append((flat, p))

    # A family each

    def _elements(self, out: Array, *, add: bool) -> None:
        known: dict[int, tuple[float, ...]] = {}
        for piece in self.pieces:
            choice = self.recipe.choices[piece.name]
            assert choice is not None
            # What is computed, and with which slots, is said by the rule; with which numbers, by the rule at this step.
            rule = self.recipe.variants[choice]
            assert isinstance(rule, ElementWise)
            if rule.scalars:
                coefficients = self._tracked(choice, piece.name)
            else:
                if choice not in known:
                    known[choice] = resolved(self.recipe, self.values, choice, self.t).coefficients(self.t)
                coefficients = known[choice]
            flat = self._flat(piece.name)
            place = out[flat]  # one object, so that the evaluator sees where the new parameters replace the old ones
            params = place if self.state.params is out else piece.p
            run = Run(piece.g, params, [self.state.slots[name][flat] for name in rule.slots], place)
            diagonal = self.gradient.diagonal.get(piece.name)
            if diagonal is not None and "hessian_diagonal" in rule.needs:
                self._observe(choice, rule, diagonal, run, flat.start)
            if piece.rows is not None and not rule.lazy_rows:
                run, piece.rows = run._replace(g=whole(piece)), None
            if piece.rows is None:
                self._evaluate(rule, coefficients, run, flat.start, add=add)
            elif piece.g.size:
                self._rows(rule, coefficients, piece, run, flat.start, add=add)

    def _observe(self, choice: int, rule: ElementWise, diagonal: Array, run: Run, start: int) -> None:
        now: ElementWise = resolved(self.recipe, self.values, choice, self.t)
        wide = [widen(slot, run.g.dtype) if slot.dtype == BF16 else slot for slot in run.slots]
        now.observe(self.t, diagonal, dict(zip(rule.slots, wide, strict=True)))
        self._narrow(run.slots, wide, start)

    def _tracked(self, choice: int, tensor: str) -> tuple[float, ...]:
        rule: ElementWise = resolved(self.recipe, self.values, choice, self.t)
        own = {name: self.state.own[f"{tensor}:{name}"] for name in rule.scalars}
        scalars = {name: float(array) for name, array in own.items()}
        coefficients = rule.tracked(self.t, scalars)
        for name, array in own.items():
            array[...] = scalars[name]
        return coefficients

    def _rows(
        self, rule: ElementWise, coefficients: Sequence[float], piece: Piece, run: Run, start: int, *, add: bool
    ) -> None:
        # Gathered, stepped and scattered back, so that the work is that of the rows named.
        table = (piece.shape[0], -1)
        picked = [array.reshape(table)[piece.rows] for array in run.slots]
        params = None if run.params is None else run.params.reshape(table)[piece.rows].reshape(-1)
        out = np.empty(piece.g.size, piece.g.dtype)
        self._evaluate(rule, coefficients, Run(piece.g, params, [a.reshape(-1) for a in picked], out), start, add=add)
        for array, new in zip(run.slots, picked, strict=True):
            array.reshape(table)[piece.rows] = new
        run.out.reshape(table)[piece.rows] = out.reshape(-1, run.out.size // piece.shape[0])

    def _evaluate(self, rule: ElementWise, coefficients: Sequence[float], run: Run, start: int, *, add: bool) -> None:
        if any(slot.dtype == BF16 for slot in run.slots):
            self._evaluate_compact(rule, coefficients, run, start, add=add)
        else:
            self._evaluate_plain(rule, coefficients, run, add=add)

    def _evaluate_plain(self, rule: ElementWise, coefficients: Sequence[float], run: Run, *, add: bool) -> None:
        needs_params = "params" in rule.needs
        if not rule.masked:
            self.evaluator.run(rule.update, run, coefficients, needs_params=needs_params, add=add)
            return
        decay = coefficients[-1] if needs_params else 0.0
        adaptive = (*coefficients[:-1], 0.0) if needs_params else coefficients
        u = np.empty_like(run.g)
        self.evaluator.run(rule.update, run._replace(out=u), adaptive, needs_params=needs_params, add=False)
        kept = u * run.g < 0
        share = float(np.count_nonzero(kept)) / max(u.size, 1)
        u *= kept * u.dtype.type(1.0 / max(share, LEAST_KEPT))
        if needs_params and run.params is not None:
            u -= u.dtype.type(decay) * run.params
        if add and run.params is not None:
            np.add(run.params, u, out=run.out)
        else:
            run.out[...] = u

    def _evaluate_compact(
        self, rule: ElementWise, coefficients: Sequence[float], run: Run, start: int, *, add: bool
    ) -> None:
        """The same with slots in bfloat16: widened, stepped, and rounded at random, a part at a time."""
        length = len(run.g) if rule.masked else COMPACT_PART
        for begin in range(0, len(run.g), max(length, 1)):
            part = slice(begin, begin + length)
            compact, out = [slot[part] for slot in run.slots], run.out[part]
            wide = [widen(slot, run.g.dtype) for slot in compact]
            params = out if run.params is run.out else None if run.params is None else run.params[part]
            self._evaluate_plain(rule, coefficients, Run(run.g[part], params, wide, out), add=add)
            self._narrow(compact, wide, start + begin)

    def _narrow(self, slots: Sequence[Array], wide: Sequence[Array], start: int) -> None:
        """Rounds `wide` into those of the slots that are in bfloat16; they begin at element `start`."""
        for index, (slot, array) in enumerate(zip(slots, wide, strict=True)):
            if slot.dtype == BF16:
                place = (self.state.step + 1, index, start)
                slot[...] = round_randomly(array, random_words(self.recipe.state_seed or 0, place, len(array)))

    def _tensors(self, out: Array, *, add: bool) -> None:
        for piece in self.pieces:
            choice = self.recipe.choices[piece.name]
            assert choice is not None
            rule = self.recipe.variants[choice]
            assert isinstance(rule, TensorWise)
            state = {name: self.state.own[f"{piece.name}:{name}"] for name in rule.own(piece.shape)}
            piece.g, piece.rows = whole(piece), None
            p = None if piece.p is None else piece.p.reshape(piece.shape)
            now: TensorWise = resolved(self.recipe, self.values, choice, self.t)
            u = now.step(self.t, piece.g.reshape(piece.shape), p, state).reshape(-1)
            flat = self._flat(piece.name)
            out[flat] = piece.p + u if add and piece.p is not None else u

    def _vector(self, out: Array, *, add: bool) -> bool:
        if not self.pieces:
            return True
        recipe, state = self.recipe, self.state
        pieces = sorted(self.pieces, key=lambda piece: recipe.layout.slots[piece.name].start)
        stretches = [self._flat(piece.name) for piece in pieces]
        everything = sum(flat.stop - flat.start for flat in stretches) == len(out)
        at: Any = slice(None)
        block: Any = (slice(None), slice(None))
        if not everything:
            at = np.concatenate([np.arange(flat.start, flat.stop) for flat in stretches])
            block = np.ix_(at, at)
        rule = recipe.variants[0]
        assert isinstance(rule, Whole)
        specs = rule.own(len(out))
        arrays = {name: state.slots[name][at] for name in rule.slots}
        for name, spec in specs.items():
            arrays[name] = state.own[f":{name}"][block] if spec.square else state.own[f":{name}"]
        for piece in pieces:
            piece.g, piece.rows = whole(piece), None
        g = np.concatenate([piece.g for piece in pieces])
        p = (
            None
            if any(piece.p is None for piece in pieces)
            else np.concatenate([piece.p for piece in pieces if piece.p is not None])
        )
        hessian = None if self.gradient.hessian is None else self.gradient.hessian[block]
        now: Whole = resolved(recipe, self.values, 0, self.t)
        u = now.step(self.t, g, p, arrays, Beside(self._rates(pieces), self.gradient.loss, hessian))
        if not everything:
            for name in rule.slots:
                state.slots[name][at] = arrays[name]
            for name, spec in specs.items():
                if spec.square:
                    state.own[f":{name}"][block] = arrays[name]
        if u is None:
            return False
        u = u.astype(out.dtype, copy=False)
        held = state.params
        out[at] = held[at] + u if add and held is not None else u
        return True

    def _rates(self, pieces: Sequence[Piece]) -> Array:
        """The learning rate of each parameter, or of all."""
        rates = [
            float(resolved(self.recipe, self.values, i, self.t).rate(self.t)) for i in range(len(self.recipe.variants))
        ]
        chosen = [rates[self.recipe.choices[piece.name] or 0] for piece in pieces]
        if len(set(chosen)) == 1:
            return np.array(chosen[0])
        sizes = [int(np.prod(piece.shape)) for piece in pieces]
        return np.repeat(np.array(chosen), sizes)


def optimizer_at(recipe: Recipe, state: State, t: int) -> Optimizer:
    """The whole optimizer, wrappers and all, with the values that its schedules have at step t."""
    return recipe.optimizer.at(t, plateau_values(recipe, state)) if recipe.schedules else recipe.optimizer
