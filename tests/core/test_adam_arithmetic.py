"""Adam and its nearest against their papers, in plain floats: each option with each other one."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest

from core.layout import Rows
from core.optimizers import Optimizer
from core.optimizers.adam import Adam, Adamax, AdamW, Nadam, RAdam, SparseAdam
from core.schedules import Linear
from tests.core.build import held, make, step, trajectory

START = [1.0, -2.0, 0.25, -0.5]
GRADIENTS = [
    [0.5, -2.0, 0.001, 0.3],
    [0.25, 4.0, -0.002, 0.3],
    [-1.0, 1.5, 0.008, -0.001],
    [0.75, -0.125, 0.0156, 0.0],
    [2.0, 3.0, -0.001, -0.3],
    [0.0, -1.0, 0.0625, 2.0],
    [0.01, -0.1, 0.0, -1.0],
]
LR, BETA1, BETA2, EPS = 0.05, 0.8, 0.7, 0.01
NO_DECAY = [0.0] * len(GRADIENTS)
SETTINGS: dict[str, Any] = {"lr": LR, "beta1": BETA1, "beta2": BETA2, "eps": EPS}


@dataclass
class Memory:
    """What a method remembers of one parameter."""

    m: float = 0.0
    v: float = 0.0
    top: float = 0.0
    product: float = 1.0


# (memory, g, t) -> update
One = Callable[[Memory, float, int], float]


def by_hand(one: One, *, cautious: bool = False, shrink: Sequence[float] = NO_DECAY) -> list[list[float]]:
    """The parameters after each step: the masked update and the decay, of `shrink[t - 1]`, which is not masked."""
    p, memories, seen = list(START), [Memory() for _ in START], []
    for t, gradients in enumerate(GRADIENTS, 1):
        updates = [one(memory, g, t) for memory, g in zip(memories, gradients, strict=True)]
        if cautious:
            kept = [1.0 if u * g < 0 else 0.0 for u, g in zip(updates, gradients, strict=True)]
            share = max(sum(kept) / len(kept), 1e-3)
            updates = [u * keep / share for u, keep in zip(updates, kept, strict=True)]
        p = [q + u - shrink[t - 1] * q for q, u in zip(p, updates, strict=True)]
        seen.append(list(p))
    return seen


def agree(rule: Optimizer, expected: list[list[float]]) -> None:
    np.testing.assert_allclose(trajectory(rule, START, GRADIENTS), expected, rtol=1e-13, atol=1e-15)


@dataclass(frozen=True)
class Options:
    eps_inside: bool = False
    eps_hat: bool = False
    bias_correction: bool = True
    amsgrad: Literal[False, "raw", "corrected"] = False
    nesterov: bool = False
    cautious: bool = False


def adam(options: Options) -> One:
    def corrected(value: float, beta: float, t: int) -> float:
        return value / (1 - beta**t) if options.bias_correction else value

    def one(memory: Memory, g: float, t: int) -> float:
        memory.m = BETA1 * memory.m + (1 - BETA1) * g
        memory.v = BETA2 * memory.v + (1 - BETA2) * g**2
        mean = corrected(memory.m, BETA1, t)
        if options.nesterov:
            mean = BETA1 * corrected(memory.m, BETA1, t + 1) + (1 - BETA1) * corrected(g, BETA1, t)
        square = memory.v
        if options.amsgrad == "raw":
            square = memory.top = max(memory.top, memory.v)
        elif options.amsgrad == "corrected":
            memory.top = max(memory.top, corrected(memory.v, BETA2, t))
            # What is corrected below, so that it is the largest of the corrected ones then.
            square = memory.top * (1 - BETA2**t) if options.bias_correction else memory.top
        inside, outside = (EPS, 0.0) if options.eps_inside else (0.0, EPS)
        if options.eps_hat:
            root = math.sqrt(square + inside) + outside
            divisor = root / math.sqrt(1 - BETA2**t) if options.bias_correction else root
        else:
            divisor = math.sqrt(corrected(square, BETA2, t) + inside) + outside
        return -LR * mean / divisor

    return one


BOTH = (False, True)
AMSGRAD: tuple[Literal[False, "raw", "corrected"], ...] = (False, "raw", "corrected")
EVERY = [Options(*choice) for choice in itertools.product(BOTH, BOTH, BOTH, AMSGRAD, BOTH, BOTH)]


@pytest.mark.parametrize("options", EVERY, ids=lambda options: "-".join(str(value) for value in vars(options).values()))
def test_adam_and_adamw(options: Options) -> None:
    agree(Adam(**SETTINGS, **vars(options)), by_hand(adam(options), cautious=options.cautious))
    expected = by_hand(adam(options), cautious=options.cautious, shrink=[LR * 0.3] * len(GRADIENTS))
    agree(AdamW(**SETTINGS, **vars(options), weight_decay=0.3), expected)


def test_the_options_are_not_the_same_thing() -> None:
    """Else a test of one against itself would pass."""
    kinds = [
        Options(), Options(eps_inside=True), Options(eps_hat=True), Options(bias_correction=False),
        Options(amsgrad="raw"), Options(amsgrad="corrected"), Options(nesterov=True), Options(cautious=True),
    ]  # fmt: skip
    ends = [tuple(by_hand(adam(options), cautious=options.cautious)[-1]) for options in kinds]
    assert len(set(ends)) == len(kinds)


def adamax(eps_inside: bool) -> One:
    inside, outside = (EPS, 0.0) if eps_inside else (0.0, EPS)

    def one(memory: Memory, g: float, t: int) -> float:
        memory.m = BETA1 * memory.m + (1 - BETA1) * g
        memory.v = max(BETA2 * memory.v, abs(g) + inside)
        return -LR / (1 - BETA1**t) * memory.m / (memory.v + outside)

    return one


def nadam(psi: float, beta1: Sequence[float] = (BETA1,) * len(GRADIENTS)) -> One:
    def one(memory: Memory, g: float, t: int) -> float:
        b = beta1[t - 1]
        now, following = b * (1 - 0.5 * math.pow(0.96, t * psi)), b * (1 - 0.5 * math.pow(0.96, (t + 1) * psi))
        memory.product *= now
        memory.m = b * memory.m + (1 - b) * g
        memory.v = BETA2 * memory.v + (1 - BETA2) * g**2
        mean = following * memory.m / (1 - memory.product * following) + (1 - now) * g / (1 - memory.product)
        return -LR * mean / (math.sqrt(memory.v / (1 - BETA2**t)) + EPS)

    return one


@dataclass(frozen=True)
class Rectified:
    beta2: float = BETA2
    threshold: float = 5.0
    eps_inside: bool = False
    eps_hat: bool = True
    adaptive: list[bool] = field(default_factory=list, compare=False)  # what was done at each step

    def __call__(self, memory: Memory, g: float, t: int) -> float:
        beta2 = self.beta2
        memory.m = BETA1 * memory.m + (1 - BETA1) * g
        memory.v = beta2 * memory.v + (1 - beta2) * g**2
        mean, correction = memory.m / (1 - BETA1**t), 1 - beta2**t
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * t * beta2**t / correction
        self.adaptive.append(length > self.threshold)
        if length <= self.threshold:
            return -LR * mean
        inside, outside = (EPS, 0.0) if self.eps_inside else (0.0, EPS)
        if self.eps_hat:
            divisor = (math.sqrt(memory.v + inside) + outside) / math.sqrt(correction)
        else:
            divisor = math.sqrt(memory.v / correction + inside) + outside
        ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        return -LR * math.sqrt(ratio) * mean / divisor


FAMILY: dict[str, tuple[Any, dict[str, Any], Callable[[], One]]] = {
    "adamw": (AdamW, {"weight_decay": 0.0}, lambda: adam(Options())),
    "adamax": (Adamax, {}, lambda: adamax(eps_inside=True)),
    "adamax outside": (Adamax, {"eps_inside": False}, lambda: adamax(eps_inside=False)),
    "nadam": (Nadam, {"momentum_decay": 0.5}, lambda: nadam(0.5)),
    "nadam at once": (Nadam, {"momentum_decay": 1e4}, lambda: adam(Options(nesterov=True))),
    "radam": (RAdam, {"beta2": 0.9}, lambda: Rectified(0.9)),
    "radam paper": (RAdam, {"beta2": 0.9, "threshold": 4.0}, lambda: Rectified(0.9, 4.0)),
    "radam inside": (RAdam, {"beta2": 0.9, "eps_inside": True}, lambda: Rectified(0.9, eps_inside=True)),
    "radam optax": (RAdam, {"beta2": 0.9, "eps_hat": False}, lambda: Rectified(0.9, eps_hat=False)),
    "radam never": (RAdam, {"beta2": 0.5}, lambda: Rectified(0.5)),
}
DECAYS: dict[str, tuple[dict[str, Any], list[float]]] = {
    "plain": ({}, NO_DECAY),
    "decayed": ({"weight_decay": 0.3}, [LR * 0.3] * len(GRADIENTS)),
    "unscaled": ({"weight_decay": 0.3, "decay_scaling": "none"}, [0.3] * len(GRADIENTS)),
    # It ends at 0; the parameters are needed all the same.
    "scheduled": ({"weight_decay": Linear(init=0.3, end=0.0, steps=3)}, [LR * 0.3, LR * 0.2, LR * 0.1, 0, 0, 0, 0]),
}


@pytest.mark.parametrize("cautious", BOTH)
@pytest.mark.parametrize("decayed", DECAYS)
@pytest.mark.parametrize("name", FAMILY)
def test_the_family(name: str, decayed: str, cautious: bool) -> None:
    (kind, options, one), (decay, shrink) = FAMILY[name], DECAYS[decayed]
    rule = kind(**SETTINGS | options | decay, cautious=cautious)
    assert rule.needs == (frozenset({"params"}) if decay else frozenset())
    agree(rule, by_hand(one(), cautious=cautious, shrink=shrink))


def test_the_rectified_ones_switch_on_the_way() -> None:
    switches = {}
    for threshold in (4.0, 5.0):
        one = Rectified(0.9, threshold)
        by_hand(one)
        switches[threshold] = one.adaptive[:: len(START)].index(True) + 1
    assert switches == {4.0: 5, 5.0: 6}


def test_the_product_of_nadam_follows_a_schedule() -> None:
    beta1 = Linear(init=0.5, end=0.9, steps=4)
    rule = Nadam(**SETTINGS | {"beta1": beta1}, momentum_decay=0.5)
    agree(rule, by_hand(nadam(0.5, [0.5, 0.6, 0.7, 0.8, 0.9, 0.9, 0.9])))


@pytest.mark.parametrize("eps_hat", [True, False])
def test_sparse_adam_moves_the_rows_that_have_a_gradient(eps_hat: bool) -> None:
    """A row's own gradients count for its means, and the number of all steps for their correction."""
    table = [[1.0, -2.0], [0.25, 0.5], [3.0, -1.0]]
    sent: Sequence[tuple[list[int], list[list[float]]]] = [
        ([1], [[0.5, -1.0]]),
        ([0, 1], [[2.0, 0.001], [0.25, 3.0]]),
        ([], []),
        ([1], [[-1.0, 0.0]]),
    ]
    one = adam(Options(eps_hat=eps_hat))
    memories = [[Memory() for _ in row] for row in table]
    session = make(SparseAdam(**SETTINGS, eps_hat=eps_hat), {"w": table})
    for t, (indices, values) in enumerate(sent, 1):
        step(session, {"w": Rows(np.array(indices, np.int64), np.reshape(values, (len(indices), 2)))})
        for row, gradients in zip(indices, values, strict=True):
            for i, g in enumerate(gradients):
                table[row][i] += one(memories[row][i], g, t)
    np.testing.assert_allclose(held(session), np.ravel(table), rtol=1e-13)
    assert held(session)[4:].tolist() == [3.0, -1.0]


@pytest.mark.parametrize("kind", [Adam, AdamW, SparseAdam, Adamax, Nadam, RAdam])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_gradient_no_step(kind: Any, dtype: str) -> None:
    decay = {"weight_decay": 0.0} if kind is AdamW else {}
    assert trajectory(kind(**decay), START, [[0.0] * 4, [-0.0] * 4], dtype=dtype).tolist() == [START, START]
