"""A model in several sessions, split by tensors: which methods that leaves as they are (docs/scaling.md)."""

import numpy as np
import pytest

from core.layout import Array
from core.optimizers import Optimizer
from core.optimizers.adam import Adam
from core.transforms import Transform
from core.transforms.clipping import ClipByGlobalNorm
from tests.core.build import go, held, make
from tests.core.sessions import RULES

RANDOM = np.random.default_rng(3)
SHAPES = {"a": (4, 3), "b": (5,), "c": (2, 6)}
PARTS = (("a",), ("b", "c"))
START = {name: RANDOM.normal(size=shape) for name, shape in SHAPES.items()}
GRADIENTS = [{name: RANDOM.normal(size=shape) for name, shape in SHAPES.items()} for _ in range(6)]
COUPLED = ("sam",)
SPLIT = [name for name, rule in RULES.items() if rule.family != "whole" and name not in COUPLED]
WHOLE = [
    name for name, rule in RULES.items() if rule.family == "whole" and name != "newton"
]  # newton's H is diagonal here


def moved(rule: Optimizer, names: tuple[str, ...], transforms: tuple[Transform, ...] = ()) -> dict[str, Array]:
    """The parameters of a session of these tensors alone, after gradients that are taken where it says."""
    session = make(rule, {name: START[name] for name in names}, dtype="float32", transforms=transforms)
    for gradient in GRADIENTS:
        point = session.layout.views(session.next_point())
        go(session, {name: point[name] - gradient[name] for name in names})
    return session.layout.views(held(session))


def in_parts(rule: Optimizer) -> dict[str, Array]:
    return {name: array for names in PARTS for name, array in moved(rule, names).items()}


@pytest.mark.parametrize("name", SPLIT)
def test_whole_tensors_apart_move_as_they_do_together(name: str) -> None:
    together, apart = moved(RULES[name], tuple(SHAPES)), in_parts(RULES[name])
    for tensor, array in together.items():
        assert np.array_equal(apart[tensor], array), tensor


@pytest.mark.parametrize("name", [*COUPLED, *WHOLE])
def test_what_couples_tensors_does_not(name: str) -> None:
    together, apart = moved(RULES[name], tuple(SHAPES)), in_parts(RULES[name])
    assert any(not np.array_equal(apart[tensor], array) for tensor, array in together.items())


def test_a_norm_over_all_couples_tensors() -> None:
    clip = (ClipByGlobalNorm(max_norm=1.0),)
    assert not np.array_equal(moved(Adam(), ("a",), clip)["a"], moved(Adam(), tuple(SHAPES), clip)["a"])
