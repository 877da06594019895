"""What grew out of Adam against the papers, in plain floats: every option with each other one."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from core.errors import InvalidRecipe
from core.optimizers.adam_momenta import Adan, AdEMAMix, between
from core.optimizers.adam_variants import AdaBelief, Adopt, LaProp, Yogi
from core.schedules import Linear
from tests.core.arithmetic import GRADIENTS, START
from tests.core.build import held, make, step, trajectory

LR, BETA1, BETA2, BETA3, EPS, ROOT, DECAY = 0.05, 0.8, 0.7, 0.95, 0.01, 0.03, 0.2
RATES = [LR - (LR - 0.01) * (t - 1) / 5 if t < 6 else 0.01 for t in range(1, len(GRADIENTS) + 1)]
FALLING = Linear(LR, 0.01, 5)
SETTINGS: dict[str, Any] = {"lr": LR, "beta1": BETA1, "beta2": BETA2, "eps": EPS}

# What a method remembers of one parameter; what it makes of it: (memory, g, t) -> (update, the decay's share of p)
Memory = dict[str, float]
One = Callable[[Memory, float, int], tuple[float, float]]


def by_hand(one: One, *, cautious: bool = False) -> list[list[float]]:
    """The parameters after each step. The update is masked, the decay is not."""
    p, memories, seen = list(START), [Memory() for _ in START], []
    for t, gradients in enumerate(GRADIENTS, 1):
        both = [one(memory, g, t) for memory, g in zip(memories, gradients, strict=True)]
        updates = [u for u, _ in both]
        if cautious:
            kept = [1.0 if u * g < 0 else 0.0 for u, g in zip(updates, gradients, strict=True)]
            share = max(sum(kept) / len(kept), 1e-3)
            updates = [u * keep / share for u, keep in zip(updates, kept, strict=True)]
        p = [q + u - shrink * q for q, u, (_, shrink) in zip(p, updates, both, strict=True)]
        seen.append(list(p))
    return seen


def combinations(**choices: list[Any]) -> Iterator[dict[str, Any]]:
    """All of them, each with and without decay, of both scalings, and caution."""
    choices = {"weight_decay": [0.0, DECAY], "decay_scaling": ["lr", "none"], "cautious": [False, True]} | choices
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def shrink_of(options: dict[str, Any], lr: float = LR) -> float:
    factor: float = lr if options["decay_scaling"] == "lr" else 1.0
    return factor * options["weight_decay"]


def mean(memory: Memory, name: str, decay: float, value: float, initial: float = 0.0) -> float:
    memory[name] = decay * memory.get(name, initial) + (1 - decay) * value
    return memory[name]


def agrees(optimizer: Any, expected: list[list[float]]) -> None:
    np.testing.assert_allclose(trajectory(optimizer, START, GRADIENTS), expected, rtol=1e-12, atol=1e-15)


def test_laprop() -> None:
    choices = combinations(
        eps_hat=[False, True],
        eps_root=[0.0, ROOT],
        centered=[False, True],
        lr_in_velocity=[False, True],
        lr=[LR, FALLING],
    )
    for options in choices:

        def one(memory: Memory, g: float, t: int, options: dict[str, Any] = options) -> tuple[float, float]:
            lr = LR if options["lr"] == LR else RATES[t - 1]
            v, average = mean(memory, "v", BETA2, g * g), mean(memory, "average", BETA2, g)
            if options["centered"] and t > 3:
                v = abs(v - average**2)
            correction = 1 - BETA2**t
            if options["eps_hat"]:
                divisor = (math.sqrt(v + options["eps_root"]) + EPS) / math.sqrt(correction)
            else:
                divisor = math.sqrt(v / correction + options["eps_root"]) + EPS
            shrink = shrink_of(options, lr)
            if options["lr_in_velocity"]:
                u = -mean(memory, "m", BETA1, lr * g / divisor) * lr / mean(memory, "rate", BETA1, lr)
            else:
                u = -lr * mean(memory, "m", BETA1, g / divisor) / (1 - BETA1**t)
            # θ ← (1 - shrink)(θ + u)
            return u * (1 - shrink), shrink

        agrees(LaProp(**SETTINGS | options, centered_after=3), by_hand(one, cautious=options["cautious"]))


def test_adabelief() -> None:
    for options in combinations(eps_root=[0.0, ROOT], eps_in_s=[False, True], nesterov=[False, True]):

        def one(memory: Memory, g: float, t: int, options: dict[str, Any] = options) -> tuple[float, float]:
            m = mean(memory, "m", BETA1, g)
            memory["s"] = BETA2 * memory.get("s", 0.0) + (1 - BETA2) * (g - m) ** 2
            beside = options["eps_root"]
            if options["eps_in_s"]:
                memory["s"] += beside
                beside = 0.0
            m_hat = m / (1 - BETA1**t)
            if options["nesterov"]:
                m_hat = BETA1 * m / (1 - BETA1 ** (t + 1)) + (1 - BETA1) * g / (1 - BETA1**t)
            return -LR * m_hat / (math.sqrt(memory["s"] / (1 - BETA2**t) + beside) + EPS), shrink_of(options)

        agrees(AdaBelief(**SETTINGS | options), by_hand(one, cautious=options["cautious"]))


def test_yogi() -> None:
    choices = combinations(
        eps_root=[0.0, ROOT],
        bias_correction=[False, True],
        initial_accumulator=[1e-6, 0.1],
        initial_momentum=[0.0, 0.02],
    )
    for options in choices:

        def one(memory: Memory, g: float, t: int, options: dict[str, Any] = options) -> tuple[float, float]:
            m = mean(memory, "m", BETA1, g, options["initial_momentum"])
            v = memory.get("v", options["initial_accumulator"])
            if v > g * g:
                v -= (1 - BETA2) * g * g
            elif v < g * g:
                v += (1 - BETA2) * g * g
            memory["v"] = v
            first, second = (1 - BETA1**t, 1 - BETA2**t) if options["bias_correction"] else (1.0, 1.0)
            return -LR * m / first / (math.sqrt(v / second + options["eps_root"]) + EPS), shrink_of(options)

        agrees(Yogi(**SETTINGS | options), by_hand(one, cautious=options["cautious"]))


def test_adopt() -> None:
    choices = combinations(
        clipping=["updates", "gradients", "none"], nesterov=[False, True], first_step=["still", "decay"]
    )
    for options in choices:

        def one(memory: Memory, g: float, t: int, options: dict[str, Any] = options) -> tuple[float, float]:
            if t == 1:
                memory["v"] = g * g
                return 0.0, shrink_of(options) if options["first_step"] == "decay" else 0.0
            n = g / max(math.sqrt(memory["v"]), EPS)
            if options["clipping"] != "none":
                limit = (t - 1 if options["clipping"] == "updates" else t) ** 0.25
                n = max(-limit, min(limit, n))
            m = mean(memory, "m", BETA1, n)
            memory["v"] = BETA2 * memory["v"] + (1 - BETA2) * g * g
            along = BETA1 * m + (1 - BETA1) * n if options["nesterov"] else m
            return -LR * along, shrink_of(options)

        agrees(Adopt(**SETTINGS | options), by_hand(one, cautious=options["cautious"]))


def test_adan() -> None:
    choices = combinations(
        eps_root=[0.0, ROOT], difference_weight=["decay", "rest"], decay_form=["proximal", "decoupled"]
    )
    for options in choices:

        def one(memory: Memory, g: float, t: int, options: dict[str, Any] = options) -> tuple[float, float]:
            change = g - memory.get("previous", g)
            memory["previous"] = g
            weight = BETA2 if options["difference_weight"] == "decay" else 1 - BETA2
            m, d = mean(memory, "m", BETA1, g), mean(memory, "d", BETA2, change)
            n = mean(memory, "n", BETA3, (g + weight * change) ** 2)
            u = -LR * (m / (1 - BETA1**t) + weight * d / (1 - BETA2**t))
            u /= math.sqrt(n / (1 - BETA3**t) + options["eps_root"]) + EPS
            shrink = shrink_of(options)
            if options["decay_form"] == "decoupled":
                return u, shrink
            # θ ← (θ + u) / (1 + shrink)
            return u / (1 + shrink), 1 - 1 / (1 + shrink)

        agrees(Adan(**SETTINGS | options, beta3=BETA3), by_hand(one, cautious=options["cautious"]))


def test_ademamix() -> None:
    choices = combinations(eps_root=[0.0, ROOT], alpha_warmup=[0, 1, 5], beta3_warmup=[0, 1, 5])
    for options in choices:

        def one(memory: Memory, g: float, t: int, options: dict[str, Any] = options) -> tuple[float, float]:
            alpha, beta3 = 4.0, BETA3
            if t < options["alpha_warmup"]:
                alpha *= t / options["alpha_warmup"]
            if t < options["beta3_warmup"]:
                share, log1, log3 = t / options["beta3_warmup"], math.log(BETA1), math.log(BETA3)
                beta3 = math.exp(log1 * log3 / ((1 - share) * log3 + share * log1))
            m, slow, v = mean(memory, "m", BETA1, g), mean(memory, "slow", beta3, g), mean(memory, "v", BETA2, g * g)
            u = -LR * (m / (1 - BETA1**t) + alpha * slow)
            return u / (math.sqrt(v / (1 - BETA2**t) + options["eps_root"]) + EPS), shrink_of(options)

        agrees(AdEMAMix(**SETTINGS | options, beta3=BETA3, alpha=4.0), by_hand(one, cautious=options["cautious"]))


def test_the_half_life_of_the_slow_mean_grows_linearly() -> None:
    half_lives = [math.log(0.5) / math.log(between(0.9, 0.9999, step / 10)) for step in range(1, 11)]
    np.testing.assert_allclose(np.diff(half_lives), (half_lives[-1] - math.log(0.5) / math.log(0.9)) / 10, rtol=1e-9)
    assert between(0.0, 0.5, 0.5) == pytest.approx(0.25)  # the half-life of 0 is 0
    assert between(0.5, 0.0, 0.5) == 0.0
    assert between(0.9, 0.5, 0.1) == 0.5  # never above its end


@pytest.mark.parametrize("optimizer", [Adopt(lr=0.1, clipping="none"), Adan(lr=0.1)])
def test_a_tensor_that_joins_later_has_a_first_gradient_of_its_own(optimizer: Any) -> None:
    """It moves as if its steps were all that there are."""
    session = make(optimizer, {"early": START, "late": START})
    for g in GRADIENTS[:3]:
        step(session, {"early": np.array(g)}, partial=True)
    for g in GRADIENTS:
        step(session, {"early": np.array(g), "late": np.array(g)})
    alone = trajectory(optimizer, START, GRADIENTS)
    np.testing.assert_array_equal(held(session)[len(START) :], alone[-1])


def test_the_first_gradient_of_adopt_moves_nothing_whatever_its_size() -> None:
    for clipping in ("updates", "gradients", "none"):
        optimizer = Adopt(eps=0.0, clipping=clipping)
        assert trajectory(optimizer, [1.0, 2.0], [[1e150, 0.0]], dtype="float64").tolist() == [[1.0, 2.0]]


def test_initial_values_of_yogi_cannot_be_scheduled() -> None:
    for name in ("initial_accumulator", "initial_momentum"):
        with pytest.raises(InvalidRecipe) as refused:
            Yogi(**{name: Linear(0.1, 0.2, 3)})  # type: ignore[arg-type]
        assert refused.value.pointer == f"/{name}"


@pytest.mark.parametrize("cls", [LaProp, AdaBelief, Yogi, Adopt, Adan, AdEMAMix])
def test_a_decay_that_falls_to_nothing(cls: Any) -> None:
    """The parameters are wanted all the time, also at the steps at which none is taken off."""
    falling = cls(lr=LR, weight_decay=Linear(DECAY, 0.0, 3))
    assert falling.needs == {"params"}
    seen = trajectory(falling, START, GRADIENTS)
    assert np.isfinite(seen).all()
    assert cls(lr=LR).needs == frozenset()
