"""NumPy by blocks and the compiled loop: the same bits, for every rule in every form.

Each distinct formula is compiled once per dtype, once to give updates and once to add them. Gradients have all
magnitudes that the dtype has, with denormals, zeros of both signs, and numbers whose squares overflow.
"""

import importlib.util
import itertools
import math
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest

import core.evaluate
from core.errors import InvalidRecipe
from core.evaluate import MUCH, SETUP, WORTH_COMPILING, Evaluator, Run, Spec
from core.layout import Array
from core.optimizers import KINDS, ElementWise
from core.optimizers.descent import Sgd, descend
from core.sums import BLOCK, norm
from tests.core.build import assert_same_bits, assert_same_state, bits, go, make, step

needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="Numba is not installed")

# (n, steps): the large one for its blocks, the small ones for what goes from step to step.
SIZES = [(1, 6), (2, 6), (16_383, 4), (16_384, 4), (16_385, 4), (1_000_003, 1)]
DTYPES = ["float32", "float64"]
LARGEST = SIZES[-1][0]


def alternatives(hint: Any) -> list[Any]:
    """The values of an option: those of a bool, of a Literal, of a union of such."""
    if hint is bool:
        return [False, True]
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [value for part in get_args(hint) for value in alternatives(part)]


def forms(cls: type[ElementWise]) -> Iterator[ElementWise]:
    """Every combination of options; numbers that are 0 by default, such as a momentum, are 0 and 0.5."""
    hints = get_type_hints(cls)
    choices = {field.name: alternatives(hints[field.name]) for field in fields(cls)}
    choices |= {field.name: [0.0, 0.5] for field in fields(cls) if hints[field.name] is float and field.default == 0}
    options = {name: values for name, values in choices.items() if values}
    for combination in itertools.product(*options.values()):
        try:
            rule = cls(**dict(zip(options, combination, strict=True)))
        except InvalidRecipe:  # options that exclude each other
            continue
        if rule.family == "elements":
            yield rule


ELEMENT_WISE = [cls for cls in KINDS.values() if issubclass(cls, ElementWise)]
FORMS = {cls.kind: list(forms(cls)) for cls in ELEMENT_WISE}


def spec_of(rule: ElementWise, dtype: str, *, target: str) -> Spec:
    needs_params, coefficients = "params" in rule.needs, len(rule.tracked(1, dict(rule.scalars)))
    add, in_place = target != "updates", target == "in_place"
    return Spec(rule.update, needs_params, len(rule.slots), coefficients, dtype, add, in_place)


def distinct() -> dict[str, list[ElementWise]]:
    """Name of a formula -> all rules in all forms that are computed by it."""
    found: dict[str, list[ElementWise]] = {}
    for rule in itertools.chain.from_iterable(FORMS.values()):
        found.setdefault(f"{rule.kind}-{rule.update.__name__}", []).append(rule)
    return found


FORMULAS = distinct()


@cache
def wild(dtype: str) -> tuple[Array, ...]:
    """Parameters, and gradients for some steps: all magnitudes of `dtype`, and what is special in it."""
    random, kind = np.random.default_rng(7), np.finfo(dtype)
    lowest, highest = math.log10(kind.smallest_subnormal), math.log10(kind.max) - 0.1
    special = [0.0, -0.0, kind.smallest_subnormal, -kind.smallest_subnormal, kind.tiny, -kind.tiny / 3, kind.max]
    arrays = []
    for index in range(1 + max(steps for _, steps in SIZES)):
        exponents = random.uniform(lowest, highest, LARGEST)
        exponents[::2] = random.uniform(-3, 1, len(exponents[::2]))  # half of them such as gradients are
        array = (10.0**exponents * random.choice([-1.0, 1.0], LARGEST)).astype(dtype)
        for at in (0, 16_380, LARGEST - 20):
            array[at + index : at + index + len(special)] = np.array(special, dtype)
        arrays.append(array)
    return tuple(arrays)


def walk(evaluator: Evaluator, rule: ElementWise, dtype: str, size: int, steps: int, *, target: str) -> list[Array]:
    """All arrays of all steps: parameters (or updates) and slots."""
    add = target != "updates"
    params, *gradients = (array[:size].copy() for array in wild(dtype)[: steps + 1])
    slots = [np.full(size, rule.initial(slot), dtype) for slot in rule.slots]
    seen = []
    scalars = dict(rule.scalars)
    for t, g in enumerate(gradients, 1):
        coefficients = rule.tracked(t, scalars)
        out = params if target == "in_place" else np.empty_like(params)
        run = Run(g, params, slots, out)
        with np.errstate(all="ignore"):  # as there is around a step
            evaluator.run(rule.update, run, coefficients, needs_params="params" in rule.needs, add=add)
        seen += [out.copy(), *[slot.copy() for slot in slots]]
        params = out if add else params
    return seen


def test_every_kind_is_here() -> None:
    assert {rule.kind for rules in FORMULAS.values() for rule in rules} == {cls.kind for cls in ELEMENT_WISE}
    assert set(FORMULAS) >= {
        "sgd-descend", "momentum-heavy_ball", "momentum-nesterov", "adagrad-adagrad", "adam-adam", "adamw-adamw",
        "rmsprop-rmsprop", "rmsprop-rmsprop_centered", "rmsprop-rmsprop_velocity", "rmsprop-rmsprop_centered_velocity",
    }  # fmt: skip


# Compiling takes most of the time. Here each formula is compiled for every target and for both types; the other three
# of the six pairs are the same loops around the same expressions.
USUAL = {("float32", "updates"), ("float64", "added"), ("float32", "in_place")}
COMPILED = [
    pytest.param(dtype, target, marks=() if (dtype, target) in USUAL else pytest.mark.soak)
    for dtype in DTYPES
    for target in ("updates", "added", "in_place")
]


@needs_numba
@pytest.mark.parametrize(("dtype", "target"), COMPILED)
@pytest.mark.parametrize("formula", FORMULAS)
def test_same_bits(formula: str, dtype: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = FORMULAS[formula]
    compiled = Evaluator()
    compiled.compile(spec_of(first, dtype, target=target))
    # All forms at two blocks and a bit, the first one at all sizes.
    cases = [(first, size, steps) for size, steps in SIZES] + [(rule, 16_385, 3) for rule in others]
    by_numpy = [walk(Evaluator(), rule, dtype, size, steps, target=target) for rule, size, steps in cases]

    def unexpected(*_: Any, **__: Any) -> None:
        pytest.fail("the compiled kernel was not used")

    monkeypatch.setattr(core.evaluate, "_run_blocks", unexpected)
    for (rule, size, steps), expected in zip(cases, by_numpy, strict=True):
        found = walk(compiled, rule, dtype, size, steps, target=target)
        for ours, theirs in zip(found, expected, strict=True):
            assert_same_bits(ours, theirs)


@needs_numba
@pytest.mark.parametrize("kind", FORMS)
def test_same_bits_in_a_session(kind: str) -> None:
    """Through check and apply, with tensors of several sizes; the kernels come into use after the first step."""
    random = np.random.default_rng(5)
    shapes = {"w": (130, 140), "b": (140,), "s": ()}
    start = {name: random.normal(size=shape) for name, shape in shapes.items()}
    compiled = Evaluator(on_missing=lambda spec: compiled.compile(spec))
    sessions = [make(FORMS[kind][0], start, dtype="float32", evaluator=each) for each in (compiled, Evaluator())]
    for _ in range(4):
        gradients = {name: random.normal(size=shape) for name, shape in shapes.items()}
        for session in sessions:
            go(session, gradients)
        assert_same_state(sessions[0].state, sessions[1].state)


@needs_numba
def test_a_gradient_that_cannot_be_written_is_taken() -> None:
    """Such as a view of a request's bytes."""
    compiled = Evaluator()
    for add in (False, True):
        compiled.compile(Spec(descend, False, 0, 1, "float32", add, in_place=add))
        g = np.frombuffer(np.arange(5, dtype=np.float32).tobytes(), np.float32)
        out = np.ones(5, np.float32)
        compiled.run(descend, Run(g, out, [], out), [0.5], needs_params=False, add=add)
        assert out.tolist() == [(1 if add else 0) - 0.5 * i for i in range(5)]


@needs_numba
def test_a_kernel_is_asked_for_once_and_only_where_it_pays() -> None:
    asked: list[Spec] = []
    evaluator = Evaluator(on_missing=asked.append)
    session = make(Sgd(), {"w": np.zeros(WORTH_COMPILING - 1)}, dtype="float32", evaluator=evaluator)
    step(session, {"w": np.ones(WORTH_COMPILING - 1)})
    assert asked == []
    session = make(Sgd(), {"w": np.zeros(WORTH_COMPILING)}, dtype="float32", evaluator=evaluator)
    for _ in range(3):
        step(session, {"w": np.ones(WORTH_COMPILING)})
    assert asked == [Spec(descend, False, 0, 1, "float32", True)]


@needs_numba
def test_small_steps_are_worth_a_kernel_too_once_there_were_many() -> None:
    asked: list[Spec] = []
    evaluator = Evaluator(on_missing=asked.append)
    run = Run(np.ones(3), np.ones(3), [], np.empty(3))
    for _ in range(MUCH // (SETUP + 3)):
        evaluator.run(descend, run, [0.5], needs_params=False, add=True)
    assert asked == []
    for _ in range(2):
        evaluator.run(descend, run, [0.5], needs_params=False, add=True)
    assert asked == [Spec(descend, False, 0, 1, "float64", True)]


@needs_numba
@pytest.mark.parametrize("kind", ["momentum", "adam", "adagrad"])
def test_a_kernel_that_comes_after_many_small_steps_gives_the_same_bits(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a session, with tensors that are too small to ask for one by themselves."""
    size, steps = 10_000, 5
    monkeypatch.setattr(core.evaluate, "MUCH", steps * (size + SETUP))
    asked: list[Spec] = []
    compiled = Evaluator(on_missing=asked.append)
    random = np.random.default_rng(3)
    start = {"w": random.normal(size=size)}
    sessions = [make(FORMS[kind][-1], start, dtype="float32", evaluator=each) for each in (compiled, Evaluator())]
    for t in range(1, 2 * steps + 1):
        gradient = {"w": random.normal(size=size) * 10.0 ** random.integers(-30, 20)}
        for session in sessions:
            go(session, gradient)
        assert bool(asked) == (t >= steps)
        if t == steps:
            compiled.compile(asked[0])
        assert_same_state(sessions[0].state, sessions[1].state)
    assert len(asked) == 1


@pytest.mark.parametrize("formula", FORMULAS)
def test_a_formula_stays_in_the_dtype(formula: str) -> None:
    """A literal number in one would make float64 of it."""
    for rule, dtype in itertools.product(FORMULAS[formula], DTYPES):
        ones = [np.ones(3, dtype) for _ in range(1 + ("params" in rule.needs) + len(rule.slots))]
        scalars = [np.dtype(dtype).type(value) for value in rule.tracked(2, dict(rule.scalars))]
        assert [array.dtype for array in rule.update(*ones, *scalars)] == [np.dtype(dtype)] * (1 + len(rule.slots))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK + 1, 3 * BLOCK])
def test_norm(size: int, dtype: str) -> None:
    array = np.random.default_rng(size).normal(size=size).astype(dtype)
    truth = math.sqrt(math.fsum(float(x) ** 2 for x in array))
    assert norm([array]) == pytest.approx(truth, rel=1e-14)
    assert norm([array[: size // 2], array[size // 2 :]]) == pytest.approx(truth, rel=1e-14)
    assert bits(np.array(norm([array]))) == bits(np.array(norm([array.copy()])))


def test_norm_is_not_finite_where_an_element_is_not() -> None:
    for bad in (np.nan, np.inf, -np.inf):
        array = np.ones(BLOCK + 5)
        array[-1] = bad
        assert not math.isfinite(norm([np.ones(3), array]))
