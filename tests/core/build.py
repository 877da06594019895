"""Makes sessions, and looks at them, in few words."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from core import averaging, schedules
from core.averaging import Averaging
from core.evaluate import Evaluator
from core.layout import Array, Layout
from core.optimizers import KINDS, Optimizer
from core.recipe import Group, Recipe
from core.schedules import Schedule
from core.session import Contribution, Outcome, Session, State, tensors_of

WORDS = {4: np.uint32, 8: np.uint64}


def schedule_of(settings: Mapping[str, Any]) -> Schedule:
    """`settings` as in a request: {"kind": "linear", "init": …}."""
    return schedules.KINDS[settings["kind"]](**{name: value for name, value in settings.items() if name != "kind"})


def averaging_of(settings: Mapping[str, Any]) -> Averaging:
    return averaging.KINDS[settings["kind"]](**{name: value for name, value in settings.items() if name != "kind"})


def optimizer_of(settings: Mapping[str, Any]) -> Optimizer:
    fields = {
        name: schedule_of(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if name != "kind"
    }
    return KINDS[settings["kind"]](**fields)


def make(
    optimizer: Optimizer,
    params: Mapping[str, Any],
    *,
    dtype: str = "float64",
    held: bool = True,
    evaluator: Evaluator | None = None,
    groups: Sequence[Group] = (),
    averaging: Averaging | None = None,
) -> Session:
    """A session at step 0 that starts from `params`, or whose client holds them."""
    arrays = {name: np.asarray(value, np.float64) for name, value in params.items()}
    layout = Layout({name: array.shape for name, array in arrays.items()})
    recipe = Recipe(optimizer, layout, dtype, tuple(groups), averaging)
    return Session.new(recipe, arrays if held else None, evaluator or Evaluator())


def step(
    session: Session, gradients: Mapping[str, Any], *, want_updates: bool = False, fresh: bool = True, **beside: Any
) -> Outcome:
    """Checks and applies one contribution; `beside` are its other members."""
    checked = session.check(Contribution(gradients, **beside))
    return session.apply(checked, want_updates=want_updates, fresh=fresh)


def trajectory(
    optimizer: Optimizer, start: Sequence[float], gradients: Sequence[Sequence[float]], **options: Any
) -> Array:
    """The parameters after each step, (steps, n), of a session that holds one flat tensor."""
    session = make(optimizer, {"w": start}, **options)
    seen = []
    for g in gradients:
        step(session, {"w": np.asarray(g, np.float64)})
        seen.append(held(session).copy())
    return np.stack(seen)


def held(session: Session) -> Array:
    """The parameters, flat."""
    assert session.state.params is not None
    return session.state.params


def bits(array: Array) -> Array:
    """`array` as the integers that it is stored as: -0.0 is not 0.0, and a NaN is itself."""
    return np.ascontiguousarray(array).view(WORDS[array.dtype.itemsize])


def assert_same_bits(first: Array, second: Array) -> None:
    assert first.dtype == second.dtype
    assert first.shape == second.shape
    np.testing.assert_array_equal(bits(first), bits(second))


def picture(session: Session) -> dict[str, Any]:
    """Everything in the state as bytes: equal pictures are equal bits."""
    tensors = tensors_of(session.recipe, session.state)
    return {"step": session.state.step} | {name: (array.shape, array.tobytes()) for name, array in tensors.items()}


def assert_same_state(first: State, second: State) -> None:
    assert first.step == second.step
    assert (first.params is None) == (second.params is None)
    if first.params is not None and second.params is not None:
        assert_same_bits(first.params, second.params)
    for ours, theirs in ((first.slots, second.slots), (first.matrices, second.matrices)):
        assert set(ours) == set(theirs)
        for name in ours:
            assert_same_bits(ours[name], theirs[name])
