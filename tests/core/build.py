"""Makes sessions, and looks at them, in few words."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from core import averaging, schedules, transforms
from core.aggregation.aggregation import ASYNC, Aggregation
from core.averaging import Averaging
from core.contributions import Closing, Contribution
from core.evaluate import Evaluator
from core.layout import Array, Layout
from core.optimizers import KINDS, Optimizer
from core.recipe import Group, Recipe
from core.schedules import Schedule
from core.session import Outcome, Session
from core.state import State, tensors_of
from core.transforms import Transform

WORDS = {4: np.uint32, 8: np.uint64}


def schedule_of(settings: Mapping[str, Any]) -> Schedule:
    """`settings` as in a request: {"kind": "linear", "init": …}."""
    fields = {name: _tuples(value) for name, value in settings.items() if name != "kind"}
    return schedules.KINDS[settings["kind"]](**fields)


def _tuples(value: Any) -> Any:
    """Lists as the core has them; in a schedule an object is another schedule."""
    if isinstance(value, dict):
        return schedule_of(value)
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def averaging_of(settings: Mapping[str, Any]) -> Averaging:
    return averaging.KINDS[settings["kind"]](**{name: value for name, value in settings.items() if name != "kind"})


def optimizer_of(settings: Mapping[str, Any]) -> Optimizer:
    return KINDS[settings["kind"]](**_fields(settings))


def transform_of(settings: Mapping[str, Any]) -> Transform:
    return transforms.KINDS[settings["kind"]](**_fields(settings))


def _fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in settings.items():
        if name == "base":
            fields[name] = optimizer_of(value)
        elif name != "kind":
            fields[name] = schedule_of(value) if isinstance(value, dict) else value
    return fields


def make(
    optimizer: Optimizer,
    params: Mapping[str, Any],
    *,
    dtype: str = "float64",
    held: bool = True,
    evaluator: Evaluator | None = None,
    groups: Sequence[Group] = (),
    averaging: Averaging | None = None,
    transforms: Sequence[Transform | Mapping[str, Any]] = (),
    state_dtype: Literal["bfloat16"] | None = None,
    aggregation: Aggregation = ASYNC,
) -> Session:
    """A session at step 0 that starts from `params`, or whose client holds them."""
    arrays = {name: np.asarray(value, np.float64) for name, value in params.items()}
    layout = Layout({name: array.shape for name, array in arrays.items()})
    made = tuple(t if isinstance(t, Transform) else transform_of(t) for t in transforms)
    seed = None if state_dtype is None else 12345
    recipe = Recipe(optimizer, layout, dtype, tuple(groups), averaging, "reject", made, state_dtype, seed, aggregation)
    return Session.new(recipe, arrays if held else None, evaluator or Evaluator())


def step(
    session: Session, gradients: Mapping[str, Any], *, want_updates: bool = False, fresh: bool = True, **beside: Any
) -> Outcome:
    """Checks and applies one contribution; `beside` are its other members."""
    checked = session.check(Contribution(gradients, **beside))
    return session.apply(checked, want_updates=want_updates, fresh=fresh)


def close(session: Session, **options: Any) -> Outcome:
    """Makes a step of the open round."""
    return session.apply(session.check(Closing(session.state.step + 1)), **options)


def go(session: Session, gradients: Mapping[str, Any], *, at: int | None = None, **options: Any) -> Outcome:
    """A step with all that the session's method needs beside the gradient; `params` must be given.

    The Hessian is positive, and so is its diagonal; the loss falls, by the step `at` where that is given.
    """
    needs, size = session.recipe.needs, session.layout.size
    if "hessian" in needs:
        options.setdefault("hessian", np.diag(np.arange(1.0, size + 1.0)))
    if "hessian_diagonal" in needs:
        options.setdefault("hessian_diagonal", {name: _diagonal(session, name) for name in gradients})
    if "loss" in needs:
        options.setdefault("loss", 10.0 / (1 + (session.state.step if at is None else at)))
    return step(session, gradients, **options)


def _diagonal(session: Session, name: str) -> Array:
    shape = session.layout.slots[name].shape
    return np.linspace(0.5, 2.0, int(np.prod(shape))).reshape(shape)


def trajectory(
    optimizer: Optimizer, start: Sequence[float], gradients: Sequence[Sequence[float]], **options: Any
) -> Array:
    """The parameters after each step, (steps, n), of a session that holds one flat tensor."""
    session = make(optimizer, {"w": start}, **options)
    seen = []
    for g in gradients:
        go(session, {"w": np.asarray(g, np.float64)})
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
    for ours, theirs in ((first.slots, second.slots), (first.own, second.own)):
        assert set(ours) == set(theirs)
        for name in ours:
            assert_same_bits(ours[name], theirs[name])
