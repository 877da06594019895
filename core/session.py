"""A session: what was asked for (Recipe), where it stands (State), and the one way in which that changes.

`check(entry)` says whether an entry can be applied, and changes nothing. `apply` takes what `check` let
through and cannot fail. The same entries in the same order give the same bits, whoever applies them.

The parameters of a state are never changed in place unless the caller says that nobody looks
(`fresh=False`): a step writes a new array, so whoever still sends the old one sends one whole step.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from core.aggregation.closing import checked_closing, closed, take_in
from core.aggregation.incoming import check_form, incoming, observe
from core.aggregation.ledger import Ahead, Sender
from core.aggregation.rounds import Round
from core.bfloat16 import widen
from core.contributions import (
    Checked,
    Closing,
    Contribution,
    Entry,
    FlatParams,
    Gradient,
    NewParams,
    NewRecipe,
    Pull,
    Reduced,
    check_change,
    checked_gradient,
    flatten,
)
from core.errors import InvalidRecipe, ParamsNotHeld
from core.evaluate import Evaluator
from core.layout import BF16, Array, Layout, Slot
from core.moves import Move, optimizer_at, own_of, plateau_values, resolved, wrappers_at
from core.optimizers import Optimizer
from core.recipe import Recipe, pointer_of
from core.state import State, carried, initial_own, initial_slots, unfinished

PARAMS_AT_STEP_ZERO = "parameters can be given to a session whose client holds them at step 0 alone"


@dataclass(slots=True)
class Outcome:
    """What a step gave: the updates (n,) if they were asked for, and what its sender has to know for the next one."""

    step: int
    updates: Array | None = None
    metrics: dict[str, Any] = field(default_factory=dict)


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
        return cls(recipe, State(0, flat, initial_slots(recipe), initial_own(recipe)), evaluator)

    @property
    def layout(self) -> Layout:
        return self.recipe.layout

    def check(self, entry: Entry, ahead: Ahead | None = None) -> Checked:
        """What `apply` takes. Raises a CoreError where the entry cannot be applied; changes nothing.

        `ahead` says where the session will stand when it is applied, if other entries come before it.
        """
        match entry:
            case Contribution():
                return self._check_contribution(entry, ahead or Ahead(self.state.step, self.state.ledger))
            case Closing():
                return checked_closing(self.recipe, self.state, entry)
            case Pull():
                self._held()
                return entry
            case NewParams():
                if self.state.params is None and self.state.step > 0:
                    raise ParamsNotHeld(PARAMS_AT_STEP_ZERO)
                return FlatParams(flatten(self.recipe, entry.params, "value"))
            case NewRecipe():
                check_change(self.recipe, self.state, entry.recipe)
                self._check_open_round(entry.recipe)
                return entry

    def _check_open_round(self, recipe: Recipe) -> None:
        """Raises InvalidRecipe where what came into the open round so far is no step of `recipe`."""
        lacking = unfinished(recipe, self.state)
        if lacking:
            changed = ("transforms", "groups", "optimizer")
            at = next((name for name in changed if getattr(recipe, name) != getattr(self.recipe, name)), "optimizer")
            raise InvalidRecipe(
                f"/{at}", f"the open round has {lacking}, with which it could not be closed: wait for it"
            )

    def _check_contribution(self, entry: Contribution, ahead: Ahead) -> Gradient:
        recipe = self.recipe
        named = entry.worker is not None or entry.base_step is not None
        if recipe.aggregation.plain and not named and entry.payload == "gradients":
            return checked_gradient(recipe, self.state, entry)
        sender = entry.sender
        check_form(recipe, entry, held=self.state.params is not None)
        ahead.ledger.admit(recipe.aggregation, ahead.step, sender)
        delayed = recipe.aggregation.delay_compensation is not None and self.state.params is not None
        point = self.next_point() if entry.payload == "params" or delayed else None
        gradient = checked_gradient(recipe, self.state, entry, point)
        gradient = incoming(recipe, self.state, entry, gradient, ahead, point)
        gradient.sender = sender
        return gradient

    # Applying

    def apply(self, checked: Checked, *, want_updates: bool = False, fresh: bool = True) -> Outcome:
        """The only way a state changes. `fresh` False may write the new parameters over the old ones."""
        state = self.state
        match checked:
            case Gradient():
                return self._contribute(checked, want_updates=want_updates, fresh=fresh)
            case Reduced():
                gradient, state.round = closed(self.recipe, state.round, checked), Round()
                state.ledger.clear_round()
                return self._step(gradient, want_updates=want_updates, fresh=fresh)
            case Pull():
                state.ledger.pull(self.recipe.aggregation, checked.worker, state.step, checked.at)
                self._back_up(checked.worker)
            case FlatParams():
                state.params = checked.params
            case NewRecipe():
                kept, self.recipe = carried(self.recipe, checked.recipe, state), checked.recipe
                state.slots = initial_slots(self.recipe, keep=kept.slots)
                state.own = initial_own(self.recipe, keep=kept.own)
        return Outcome(state.step)

    def _contribute(self, gradient: Gradient, *, want_updates: bool, fresh: bool) -> Outcome:
        """A contribution becomes a step, or part of the open round."""
        sender, aggregation = gradient.sender, self.recipe.aggregation
        if sender is None and not aggregation.rounds:
            return self._step(gradient, want_updates=want_updates, fresh=fresh)
        sender = sender or Sender()
        self.state.ledger.record(aggregation, self.state.step, sender)
        if aggregation.rounds:
            take_in(self.recipe, self.state.round, gradient, sender.weight)
            return Outcome(self.state.step)
        if gradient.raw is not None:
            observe(self.recipe, self.state, gradient.raw)
        outcome = self._step(gradient, want_updates=want_updates, fresh=fresh)
        if sender.pulls and aggregation.delay_compensation is not None:
            self._back_up(sender.worker or "")
        return outcome

    def _back_up(self, worker: str) -> None:
        """Keeps the point that `worker` is handed: in an array of its own, since a step may write over the other."""
        state = self.state
        state.delays.keep(worker, self.next_point().copy(), self.recipe.aggregation.backups, state.ledger.workers)

    def _step(self, gradient: Gradient, *, want_updates: bool, fresh: bool) -> Outcome:
        state, recipe = self.state, self.recipe
        climbing = bool(state.own.get(":climbing", False))
        updates, moved = Move(recipe, state, self.evaluator, gradient).take(want_updates=want_updates, fresh=fresh)
        state.step += 1
        if moved:
            state.moves += 1
            if recipe.averaging is not None and state.params is not None:
                recipe.averaging.include(state.slots["average"], state.params, state.moves)
        # A loss counts where it is one at the parameters: not where SAM climbed to, nor at a trial that was not taken.
        tried = recipe.method.family == "whole" and recipe.method.hands_out and not moved
        if gradient.loss is not None and not climbing and not tried:
            for path, plateau in recipe.plateaus.items():
                plateau.observe(state.own[f":plateau.{path}"], gradient.loss)
        return Outcome(state.step, updates, self.metrics() if recipe.transforms else {})

    # Looking

    @np.errstate(all="ignore")
    def next_point(self) -> Array:
        """The point (n,) at which the next gradient is to be taken. Raises ParamsNotHeld."""
        held, recipe = self._held(), self.recipe
        methods: list[Optimizer] = [*recipe.variants, *recipe.wrappers]
        if not any(method.hands_out for method in methods):
            return held
        point, t = held.copy(), self.state.moves + 1
        values = plateau_values(recipe, self.state)
        wrappers = wrappers_at(recipe, values, t)[::-1]
        for slot, variant in self.recipe.live():
            flat = slice(slot.start, slot.stop)
            state = self._state_of(slot)
            point[flat] = resolved(recipe, values, variant, t).point(t, point[flat], state)
            for wrapper in wrappers:
                point[flat] = wrapper.point(t, point[flat], state)
        return point

    @np.errstate(all="ignore")
    def final_point(self) -> Array:
        """The point (n,) to use as the result: the average where there is one. Raises ParamsNotHeld."""
        held, state = self._held(), self.state
        averaging = self.recipe.averaging
        if averaging is not None:
            point = averaging.result(state.slots["average"], held, state.moves)
            return point.copy() if point is state.slots["average"] else point
        if not any(method.has_final for method in [*self.recipe.variants, *self.recipe.wrappers]):
            return held
        point = held.copy()
        values = plateau_values(self.recipe, state)
        wrappers = wrappers_at(self.recipe, values, max(state.moves, 1))[::-1]
        for slot, variant in self.recipe.live():
            flat = slice(slot.start, slot.stop)
            method = resolved(self.recipe, values, variant, max(state.moves, 1))
            remembered = self._state_of(slot)
            point[flat] = method.final(state.moves, point[flat], remembered)
            for wrapper in wrappers:
                point[flat] = wrapper.final(state.moves, point[flat], remembered)
        return point

    def _held(self) -> Array:
        if self.state.params is None:
            raise ParamsNotHeld("this session's client holds the parameters")
        return self.state.params

    def _state_of(self, slot: Slot) -> dict[str, Array]:
        """All that is remembered of a tensor, and of all of them, by its short name."""
        found: dict[str, Array] = {}
        for name, flat in self.state.slots.items():
            stretch = flat[slot.start : slot.stop]
            found[name] = widen(stretch, self.recipe.numpy_dtype) if stretch.dtype == BF16 else stretch
        for name, array in self.state.own.items():
            tensor, _, short = name.rpartition(":")
            if tensor in ("", slot.name):
                found[short] = array
        return found

    def rate(self, t: int | None = None) -> float:
        """The learning rate of move t, of the next one if left out."""
        t = self.state.moves + 1 if t is None else t
        return optimizer_at(self.recipe, self.state, t).rate(t)

    def metrics(self) -> dict[str, Any]:
        """What the transforms have to tell the client for its next gradient."""
        found: dict[str, Any] = {}
        for name, transform in zip(self.recipe.transform_names, self.recipe.transforms, strict=True):
            found |= transform.metrics(own_of(self.state, name, transform))
        return found

    def preview(self, steps: int) -> dict[str, list[float]]:
        """`lr`, the rate, and whatever has a schedule by its JSON pointer in the recipe, over the next `steps` moves.

        What looks at the loss is shown as it stands now: nobody knows what the loss will be.
        """
        coming = range(self.state.moves + 1, self.state.moves + 1 + steps)
        values = plateau_values(self.recipe, self.state)
        found = {"lr": [self.rate(t) for t in coming]}
        for path, schedule in self.recipe.schedules.items():
            found[pointer_of(path)] = [values[path] if path in values else schedule.at(t) for t in coming]
        return found
