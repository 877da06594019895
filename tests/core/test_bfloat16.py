"""bfloat16 by arithmetic on Python's floats, what the rounding draws, and sessions that keep their slots in it."""

import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from core.averaging import Ema
from core.bfloat16 import random_words, round_randomly, widen
from core.contributions import NewRecipe
from core.errors import CoreError, InvalidRecipe
from core.evaluate import Evaluator
from core.layout import BF16, Array, Rows
from core.moves import COMPACT_PART
from core.optimizers import KINDS, ElementWise, Optimizer
from core.optimizers.adam import Adam, AdamW, SparseAdam
from core.optimizers.adaptive import Adagrad, RmsProp
from core.optimizers.descent import Momentum, Sgd
from core.optimizers.sophia import Sophia
from core.optimizers.wrappers import Lookahead, Sam, Wrapper
from core.recipe import Group
from core.schedules import Linear
from core.session import Session
from core.state import state_of, tensors_of
from tests.core.build import assert_same_bits, go, held, make, picture, step
from tests.core.test_evaluators import FORMS, needs_numba

SEED = 12345  # of tests.core.build.make
ALL = np.arange(2**16, dtype="<u2")
FINITE = ALL[(ALL & 0x7F80) != 0x7F80]
RANDOM = np.random.default_rng(3)
START = {"w": RANDOM.normal(size=(4, 3)), "b": RANDOM.normal(size=3), "s": np.array(0.5), "e": np.zeros((0, 2))}
GRADIENTS = [{name: RANDOM.normal(size=value.shape) for name, value in START.items()} for _ in range(6)]


def words(array: Array) -> Array:
    """What a BF16 array is stored as."""
    return array.view("<u2")


def of_words(found: Any) -> Array:
    return np.asarray(found, "<u2").view(BF16)


def value_of(word: int) -> float:
    """A finite one, from its sign, 8 bits of exponent and 7 bits of fraction."""
    sign, exponent, fraction = word >> 15, word >> 7 & 0xFF, word & 0x7F
    size = math.ldexp(128 + fraction, exponent - 134) if exponent else math.ldexp(fraction, -133)
    return -size if sign else size


VALUES = np.array([value_of(int(word)) for word in FINITE])


def nearest(values: Array) -> Array:
    """Rounded to the nearest, ties to even, as the conversions of libraries do; values are finite."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    up = np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    return ((bits + up) >> np.uint32(16) << np.uint32(16)).view(np.float32)


# Numbers


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_number_is_widened_exactly(dtype: str) -> None:
    found = widen(of_words(FINITE), np.dtype(dtype))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.astype(np.float64), VALUES)
    np.testing.assert_array_equal(np.signbit(found), FINITE >> 15 == 1)
    assert widen(of_words([[0x3F80, 0xFF80]]), np.dtype(dtype)).tolist() == [[1.0, -math.inf]]
    with np.errstate(invalid="ignore"):  # a signalling NaN
        others = widen(of_words(ALL), np.dtype(dtype))
    assert np.isnan(others).sum() == 2 * 127
    assert np.isinf(others).sum() == 2


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("drawn", [0, 1, 0x8000, 0xFFFF])
def test_what_bfloat16_has_stays_itself(drawn: int, dtype: str) -> None:
    """Whatever is drawn, infinities and NaN too. So a slot that does not move is not worn away."""
    with np.errstate(invalid="ignore"):
        rounded = round_randomly(widen(of_words(ALL), np.dtype(dtype)), np.full(len(ALL), drawn, np.uint32))
    assert rounded.dtype == BF16
    changed = ALL[words(rounded) != ALL]
    # float64 makes the 2 · 63 signalling NaN quiet ones.
    assert len(changed) == (126 if dtype == "float64" else 0)
    assert np.isnan(widen(of_words(changed | 0x40), np.dtype(np.float32))).all()


# Numbers between two neighbours; subnormal ones, those about 1, those below the last finite one, of both signs.
BETWEEN = [1.0 + 2**-9, 1.0 + 2**-8 - 2**-23, 3.0e-39, 1.4e-45, -0.3, -1e-42, 255.7, 1e-38, -3.38e38]


@pytest.mark.parametrize("value", BETWEEN)
def test_rounding_is_right_in_the_mean_over_all_that_can_be_drawn(value: float) -> None:
    exact = np.float32(value)
    drawn = np.arange(2**16, dtype=np.uint32)
    found = widen(round_randomly(np.full(2**16, exact), drawn), np.dtype(np.float64))
    below, above = (float(bound) for bound in (found.min(), found.max()))
    assert set(found) == {below, above}
    assert below < exact < above
    where = np.searchsorted(np.unique(VALUES), exact)
    assert [below, above] == np.unique(VALUES)[[where - 1, where]].tolist()
    assert found.mean() == pytest.approx(float(exact), rel=1e-12, abs=0)


@pytest.mark.parametrize("value", BETWEEN)
def test_rounding_is_right_in_the_mean_of_what_is_drawn(value: float) -> None:
    count = 200_000
    exact = float(np.float32(value))
    found = widen(round_randomly(np.full(count, value, np.float32), random_words(1, (1, 0, 0), count)), np.dtype(float))
    spread = np.ptp(np.unique(VALUES)[np.searchsorted(np.unique(VALUES), exact) - 1 :][:2])
    assert abs(found.mean() - exact) <= 5 * 0.5 * spread / math.sqrt(count)


def test_specials() -> None:
    given = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, 2.0**-149, 3.4028234e38], np.float32)
    for dtype in (np.float32, np.float64):
        low, high = (words(round_randomly(given.astype(dtype), np.full(7, drawn, np.uint32))) for drawn in (0, 0xFFFF))
        assert low.tolist() == [0x7FC0, 0x7F80, 0xFF80, 0x8000, 0, 0, 0x7F7F]
        assert high.tolist() == [0x7FC0, 0x7F80, 0xFF80, 0x8000, 0, 1, 0x7F80]
    for word in (0x7FC0_FFFF, 0x7FFF_FFFF, 0xFFFF_FFFF):  # NaN that must not become something else by a carry
        carried = round_randomly(np.array([word], np.uint32).view(np.float32), np.full(1, 0xFFFF, np.uint32))
        assert words(carried).tolist() == [word >> 16]
    beyond = round_randomly(np.array([1e300, -1e300, 1e-300]), np.full(3, 0xFFFF, np.uint32))
    assert words(beyond).tolist() == [0x7F80, 0xFF80, 0]


# What is drawn


def test_the_random_words_are_the_same_for_ever() -> None:
    assert random_words(SEED, (1, 0, 0), 8).tolist() == [47470, 60791, 40675, 44946, 22359, 9921, 29700, 34823]
    assert random_words(2**53 - 1, (7, 2, 262_144), 5).tolist() == [7892, 17313, 20809, 25935, 60890]
    assert random_words(0, (2**40, 1, 3), 4).tolist() == [44807, 21903, 58820, 40430]
    assert random_words(0, (1, 0, 0), 0).tolist() == []


def test_the_random_words_are_those_of_their_place_alone() -> None:
    first = random_words(5, (3, 1, 100), 1000)
    for count in (1, 2, 3, 4, 999):
        np.testing.assert_array_equal(random_words(5, (3, 1, 100), count), first[:count])
    others = [(6, (3, 1, 100)), (5, (4, 1, 100)), (5, (3, 0, 100)), (5, (3, 1, 101)), (5, (3, 1, 0)), (5, (1, 3, 100))]
    for seed, place in others:
        other = random_words(seed, place, 1000)
        # Nor the same ones a few places on, which a neighbour would have that only began later in one stream.
        for shift in range(-8, 9):
            assert (np.roll(other, shift) == first).mean() < 0.02


def test_the_random_words_are_even() -> None:
    found = random_words(9, (2, 0, 0), 2**18)
    for bit in range(16):
        assert abs((found >> bit & 1).mean() - 0.5) < 5 * 0.5 / 2**9
    counts = np.bincount(found >> 8, minlength=256)
    assert abs(((counts - 1024.0) ** 2 / 1024.0).sum() - 255) < 5 * math.sqrt(2 * 255)


# Sessions

# What the classes of these say is what they are to say; others say it for themselves.
WITH = {
    "momentum", "signum", "lion", "adagrad", "adadelta", "rmsprop", "adam", "adamw", "sparse_adam", "adamax", "nadam",
    "radam", "laprop", "adabelief", "yogi", "adopt", "ademamix", "sophia", "fedadam", "lookahead", "sam",
}  # fmt: skip
WITHOUT = {
    "rprop", "adan", "asgd", "schedule_free", "ftrl", "fedadagrad", "fedyogi",  # slots that are not means
    "sgd", "signsgd",  # no slots
    "lamb", "adafactor", "muon", "prodigy", "newton", "lbfgs",  # not element by element
}  # fmt: skip


def compact(rule: Optimizer, start: Any = START, **options: Any) -> Session:
    return make(rule, start, state_dtype="bfloat16", **options)


def has_it(rule: Optimizer) -> bool:
    """As its class says, or that of what it wraps."""
    if isinstance(rule, Wrapper):
        return has_it(rule.base)
    return isinstance(rule, ElementWise) and rule.compact and len(rule.slots) > 0


def test_which_kinds_are_to_have_it() -> None:
    assert {kind for kind in WITH | WITHOUT if has_it(KINDS[kind]())} == WITH


@pytest.mark.parametrize("kind", KINDS)
def test_which_kinds_have_it(kind: str) -> None:
    if has_it(KINDS[kind]()):
        session = compact(KINDS[kind]())
        slots = {name for variant in session.recipe.variants for name in variant.slots}
        assert {array.dtype == BF16 for name, array in session.state.slots.items() if name in slots} == {True}
        return
    with pytest.raises(InvalidRecipe, match=f"the state of {kind} cannot be kept in bfloat16") as refused:
        compact(KINDS[kind]())
    assert refused.value.pointer == "/state_dtype"


def test_forms_that_have_it_not() -> None:
    for rule in (Adagrad(matrix="full"), Lookahead(Sgd()), Sam(KINDS["lamb"]())):
        with pytest.raises(InvalidRecipe, match="cannot be kept in bfloat16"):
            compact(rule)


@pytest.mark.parametrize(("dtype", "wide"), [("float32", 8), ("float64", 16)])
def test_the_memory_it_takes(dtype: str, wide: int) -> None:
    start = {"w": np.zeros((100, 10))}
    plain, small = make(Adam(), start, dtype=dtype), compact(Adam(), start, dtype=dtype)
    assert (plain.recipe.state_bytes(), small.recipe.state_bytes()) == (1000 * wide, 1000 * 4)
    assert small.state.nbytes == 1000 * (4 + wide // 2)  # with the parameters, which stay as they are
    around = compact(Lookahead(Adam()), start, dtype=dtype, averaging=Ema(), transforms=[{"kind": "ema", "decay": 0.9}])
    assert around.recipe.state_bytes() == 1000 * (4 + 3 * wide // 2) + 8
    assert {name: array.dtype.name for name, array in around.state.slots.items() if array.dtype != BF16} == {
        "lag": dtype, "average": dtype, "ema.mean": dtype,
    }  # fmt: skip


def by_hand(g: Array, m: Array, t: int, lr: float, start: int = 0) -> tuple[Array, Array]:
    """Heavy ball in float32: (u, the BF16 velocity), with the words of a tensor that begins at element `start`."""
    v = np.float32(0.9) * widen(m, np.dtype(np.float32)) + np.float32(1.0) * g
    drawn = [random_words(SEED, (t, 0, start + at), min(COMPACT_PART, len(g) - at))
             for at in range(0, len(g), COMPACT_PART)]  # fmt: skip
    return -np.float32(lr) * v, round_randomly(v, np.concatenate(drawn))


@pytest.mark.parametrize("size", [1, 3, 262_143, 262_144, 262_145, 524_289])
def test_each_element_has_its_own_draw_whatever_the_size(size: int) -> None:
    """Two tensors; the steps are counted, and the places go through all of them."""
    assert COMPACT_PART == 262_144  # another number gives other bits, and the logs of running sessions other states
    start = {"a": np.zeros(5), "b": np.zeros(size)}
    session = compact(Momentum(lr=0.1), start, dtype="float32")
    p, slots = np.zeros(size, np.float32), of_words(np.zeros(size))
    for t in (1, 2, 3):
        g = np.random.default_rng(t).normal(size=size).astype(np.float32)
        step(session, {"a": np.ones(5), "b": g})
        u, slots = by_hand(g, slots, t, 0.1, start=5)
        p += u
        np.testing.assert_array_equal(words(session.state.slots["v"][5:]), words(slots))
        assert_same_bits(held(session)[5:], p)


def test_what_is_drawn_goes_by_the_gradients_and_not_by_the_moves() -> None:
    session = compact(
        Momentum(lr=0.1), {"w": np.zeros(9)}, dtype="float32", transforms=[{"kind": "accumulate", "steps": 2}]
    )
    slots = of_words(np.zeros(9))
    for t in (2, 4):
        g = np.linspace(0.1, 0.9, 9).astype(np.float32)
        step(session, {"w": g})
        step(session, {"w": g})
        _, slots = by_hand(g, slots, t, 0.1)
        np.testing.assert_array_equal(words(session.state.slots["v"]), words(slots))


@needs_numba
@pytest.mark.parametrize("fresh", [True, False])
def test_the_compiled_loop_gives_the_same_bits(fresh: bool) -> None:
    evaluator = Evaluator(on_missing=lambda spec: evaluator.compile(spec))
    start = {"w": np.linspace(-1, 1, COMPACT_PART + 20_000)}
    plain, compiled = compact(Adam(), start, dtype="float32"), compact(Adam(), start, evaluator=evaluator,
                                                                       dtype="float32")  # fmt: skip
    for t in range(4):
        g = {"w": np.random.default_rng(t).normal(size=len(start["w"]))}
        step(plain, g)
        step(compiled, g, fresh=fresh)
    assert picture(plain) == picture(compiled)


def test_the_first_step_is_that_of_the_wide_state() -> None:
    """What is rounded is only what is kept."""
    for rule in (Adam(), Momentum(), RmsProp()):
        small, wide = compact(rule, dtype="float32"), make(rule, START, dtype="float32")
        step(small, GRADIENTS[0])
        step(wide, GRADIENTS[0])
        assert_same_bits(held(small), held(wide))


FALLING = [1.0] * 20 + [0.01] * 1500


def test_a_second_moment_falls_as_it_should_where_the_nearest_number_would_stand_still() -> None:
    """After gradients of 1, gradients of 0.01: v falls by a thousandth a step, less than half a unit of its place."""
    rule = Adam(lr=1e-3)
    start = {"w": np.zeros(256)}
    small, wide = compact(rule, start, dtype="float32"), make(rule, start, dtype="float32")
    v = p = m = np.float32(0.0)
    for t, value in enumerate(FALLING, 1):
        g = np.float32(value)
        m = nearest(np.float32(0.9) * m + np.float32(0.1) * g)
        v = nearest(np.float32(0.999) * v + np.float32(0.001) * g * g)
        p -= np.float32(1e-3) * (m / np.float32(1 - 0.9**t)) / np.sqrt(v / np.float32(1 - 0.999**t))
        for session in (small, wide):
            step(session, {"w": np.full(256, g)})
    right = float(wide.state.slots["v"][0])
    assert right < 0.25 * 0.02  # it began at 1 - 0.999^20, which is 0.02
    assert v > 3.5 * right  # to the nearest it is where it was
    found = widen(small.state.slots["v"], np.dtype(float))
    # A rounding here has a standard deviation of 0.4 units, a unit being some 0.55 % of v: after 1500 of them that of a
    # v is 8.5 %. It counts by half in a step, and along the way on the average by 1/√3 of that: 2.5 %. Their mean has
    # a sixteenth of each, and the bias of a root is below 0.3 %. All bounds are four deviations.
    assert abs(found.mean() / right - 1) < 4 * 0.085 / 16
    assert np.abs(found / right - 1).max() < 4 * 0.085
    way, ways = float(held(wide)[0]), held(small).astype(float)
    assert abs(ways.mean() / way - 1) < 4 * 0.025 / 16 + 0.003
    assert np.abs(ways / way - 1).max() < 4 * 0.025
    assert float(p) / way < 0.9


# The same entries, the same bits


@pytest.mark.parametrize("rule", [Adam(), AdamW(cautious=True, weight_decay=0.1), SparseAdam(), Sophia(interval=2),
                                  Lookahead(RmsProp(centered=True, momentum=0.5), 2), Sam(Momentum())],
                         ids=lambda rule: rule.kind)  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_whatever_is_asked_for_a_replay_and_a_copy_give_the_same_bits(rule: Optimizer, dtype: str) -> None:
    options: Any = {"dtype": dtype, "groups": [Group("b", {"lr": 0.5}), Group("s", {}, frozen=True)]}
    ways = [(False, True), (True, True), (True, False), (False, False)]
    sessions = [compact(rule, **options) for _ in ways]
    whole = sessions[0].recipe.whole_only
    for t, gradients in enumerate(GRADIENTS, 1):
        some = {"w": Rows(np.array([2, 0]), gradients["w"][:2])} if t == 3 else {"b": gradients["b"]}
        sent = gradients if whole or t not in (3, 5) else some
        for session, (want_updates, fresh) in zip(sessions, ways, strict=True):
            go(session, sent, partial=sent is some, want_updates=want_updates, fresh=fresh)
        tensors = tensors_of(sessions[0].recipe, sessions[0].state)
        state = state_of(
            sessions[0].recipe, t, {name: a.copy() for name, a in tensors.items()}, sessions[0].state.moves
        )
        sessions[1] = Session(sessions[0].recipe, state, Evaluator())
        for session in sessions[1:]:
            assert picture(session) == picture(sessions[0])
    assert tensors["w:" + rule.slots[0]].dtype == BF16
    assert np.isfinite(held(sessions[0])).all()
    assert not words(sessions[0].state.slots[rule.slots[0]][15:16]).any()  # frozen


def test_another_seed_gives_other_bits_and_the_parameters_place_does_not() -> None:
    session, other, there = compact(Adam()), compact(Adam()), compact(Adam(), held=False)
    other.recipe = replace(other.recipe, state_seed=SEED + 1)
    for gradients in GRADIENTS[:3]:
        for each in (session, other, there):
            step(each, gradients)
    assert picture(session)["w:v"] == picture(there)["w:v"]
    assert picture(session)["w:v"] != picture(other)["w:v"]


def test_a_partial_step_draws_for_its_own_tensors_and_leaves_the_others() -> None:
    session = compact(Adam())
    step(session, GRADIENTS[0])
    before = picture(session)
    step(session, {"b": GRADIENTS[1]["b"]}, partial=True)
    step(session, {"w": Rows(np.zeros(0, int), np.zeros((0, 3)))}, partial=True)
    after = picture(session)
    assert {name for name in after if after[name] != before[name]} >= {"b", "b:m", "b:v"}
    assert all(after[name] == before[name] for name in ("s", "s:m", "s:v"))


def test_rows_of_a_lazy_method_round_their_own_alone() -> None:
    session = compact(SparseAdam())
    step(session, GRADIENTS[0])
    before = words(session.state.slots["m"][:12].reshape(4, 3)).copy()
    step(session, {"w": Rows(np.array([3, 1]), np.ones((2, 3)))}, partial=True)
    after = words(session.state.slots["m"][:12].reshape(4, 3))
    assert (after == before).all(axis=1).tolist() == [True, False, True, False]


def test_a_diagonal_of_the_hessian_is_taken_in() -> None:
    session = compact(Sophia(beta2=0.75), {"a": [0.0], "w": np.zeros(3)}, dtype="float32")
    diagonal = np.array([1.0, -2.0, 0.3], np.float32)
    g = {"a": np.zeros(1), "w": np.zeros(3)}
    step(session, g, hessian_diagonal={"a": np.zeros(1), "w": diagonal})
    expected = round_randomly(np.float32(0.25) * diagonal, random_words(SEED, (1, 1, 1), 3))
    np.testing.assert_array_equal(words(session.state.slots["h"][1:]), words(expected))
    before = words(session.state.slots["h"]).copy()
    step(session, g)
    np.testing.assert_array_equal(words(session.state.slots["h"]), before)


def test_the_next_point_is_made_of_the_widened_velocity() -> None:
    session = compact(Momentum(lr=1.0, momentum=0.5, nesterov="lookahead"), {"w": np.zeros(2)})
    step(session, {"w": np.array([1.0, -0.75])})
    assert session.next_point().tolist() == [-1.5, 1.125]


def test_a_change_of_recipe_keeps_the_slots_and_cannot_change_what_they_are() -> None:
    session = compact(Adam())
    step(session, GRADIENTS[0])
    before = picture(session)
    session.apply(session.check(NewRecipe(replace(session.recipe, optimizer=Adam(lr=Linear(0.1, 0.0, 5))))))
    assert picture(session) == before
    for change in ({"state_dtype": None, "state_seed": None}, {"state_seed": SEED + 1}):
        with pytest.raises(InvalidRecipe):
            session.check(NewRecipe(replace(session.recipe, **change)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", [kind for kind in FORMS if has_it(KINDS[kind]())])
def test_no_form_of_any_kind_fails_on_what_was_checked(kind: str, dtype: str) -> None:
    start = {"w": np.ones((3, 2)), "none": np.zeros((0, 3)), "s": np.array(-0.0)}
    for rule in FORMS[kind]:
        try:
            session = compact(rule, start, dtype=dtype)
        except CoreError:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for scale in (1.0, 0.0, 1e38, 1e-45, 1e19, 1.0):
                gradients = {name: np.full(value.shape, scale) for name, value in start.items()}
                go(session, gradients, want_updates=scale == 0.0)
                session.next_point()
                session.final_point()
        assert session.state.step == 6
