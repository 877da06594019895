"""Methods around methods, against plain loops from their papers: lookahead and sam.

The loops are over floats, and so are those of what is wrapped: an element-wise method (momentum), one that looks at
whole tensors (lars) and one that looks at all of them (polyak_sgd). What libraries say is in golden/wrappers_cases.py.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import pytest

from core.averaging import Polyak
from core.contributions import NewParams, NewRecipe
from core.errors import InvalidRecipe, MissingGradient, ParamsRequired
from core.evaluate import Evaluator
from core.layout import Array, Rows
from core.optimizers import KINDS, Optimizer
from core.optimizers.adam import Adam, AdamW, SparseAdam
from core.optimizers.averaged import Asgd, ScheduleFree
from core.optimizers.descent import Momentum, Sgd
from core.optimizers.layerwise import Lars
from core.optimizers.parameter_free import PolyakSgd
from core.optimizers.second_order import Newton
from core.optimizers.wrappers import Lookahead, Sam
from core.recipe import Group
from core.schedules import Linear, Plateau
from core.session import Session
from core.state import state_of, tensors_of
from tests.core.build import assert_same_bits, assert_same_state, held, make, picture, step

Floats: TypeAlias = dict[str, list[float]]
Step: TypeAlias = Callable[[Floats, Floats, float], Floats]

START: Floats = {"w": [1.0, -2.0, 0.5, 4.0], "b": [0.25, -1.5]}
SHAPES = {"w": (2, 2), "b": (2,)}
CURVATURES = {"w": [1.0, 0.5, 3.0, 0.1], "b": [2.0, 0.25]}


def loss_at(p: Floats) -> float:
    return sum(c * x * x / 2 + x**4 / 8 for name in p for c, x in zip(CURVATURES[name], p[name], strict=True))


def gradient_at(p: Floats) -> Floats:
    return {name: [c * x + x**3 / 2 for c, x in zip(CURVATURES[name], p[name], strict=True)] for name in p}


def size(tensors: Floats) -> float:
    return math.sqrt(sum(x * x for values in tensors.values() for x in values))


def plus(p: Floats, u: Floats, share: float = 1.0) -> Floats:
    return {name: [x + share * y for x, y in zip(p[name], u[name], strict=True)] for name in p}


# What is wrapped, by hand: (p, g, loss) -> u


def momentum_by_hand(lr: float = 0.05, beta: float = 0.5) -> Step:
    v = {name: [0.0] * len(values) for name, values in START.items()}

    def go(p: Floats, g: Floats, loss: float) -> Floats:
        for name in p:
            v[name] = [beta * x + y for x, y in zip(v[name], g[name], strict=True)]
        return {name: [-lr * x for x in v[name]] for name in p}

    return go


def lars_by_hand() -> Step:
    def go(p: Floats, g: Floats, loss: float) -> Floats:
        rates = {name: 0.3 * size({name: p[name]}) / size({name: g[name]}) for name in p}
        return {name: [-rates[name] * x for x in g[name]] for name in p}

    return go


def polyak_by_hand() -> Step:
    def go(p: Floats, g: Floats, loss: float) -> Floats:
        rate = min(0.3, loss / size(g) ** 2)
        return {name: [-rate * x for x in g[name]] for name in p}

    return go


BASES: dict[str, tuple[Optimizer, Callable[[], Step]]] = {
    "momentum": (Momentum(lr=0.05, momentum=0.5), momentum_by_hand),
    "lars": (Lars(lr=0.5, momentum=0.0, trust_coefficient=0.6), lars_by_hand),
    "polyak_sgd": (PolyakSgd(max_lr=0.3), polyak_by_hand),
}


# Ours


def arrays(p: Floats) -> dict[str, Array]:
    return {name: np.array(values).reshape(SHAPES[name]) for name, values in p.items()}


def floats(session: Session, flat: Array) -> Floats:
    return {name: view.reshape(-1).tolist() for name, view in session.layout.views(flat).items()}


def follow(session: Session, **options: Any) -> Floats:
    """One gradient, taken where the session wants it. Gives the parameters."""
    there = floats(session, session.next_point())
    loss = loss_at(there) if "loss" in session.recipe.needs else None
    step(session, arrays(gradient_at(there)), loss=loss, **options)
    return floats(session, held(session))


def assert_close(found: Floats, expected: Floats) -> None:
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-13, atol=1e-15)


# Lookahead: k steps forward, 1 step back


@pytest.mark.parametrize(("period", "share"), [(1, 0.5), (3, 0.5), (4, 0.2), (2, 0.0), (5, 1.0)])
@pytest.mark.parametrize("name", BASES)
def test_lookahead_by_hand(name: str, period: int, share: float) -> None:
    """Algorithm 1 of the paper, which keeps the slow weights themselves."""
    base, by_hand = BASES[name]
    session, go = make(Lookahead(base, period, share), arrays(START)), by_hand()
    slow = fast = START
    for t in range(1, 14):
        fast = plus(fast, go(fast, gradient_at(fast), loss_at(fast)))
        if t % period == 0:
            slow = plus(slow, plus(fast, slow, -1.0), share)
            fast = slow
        assert_close(follow(session), fast)


def test_lookahead_in_float32_syncs_exactly_where_nothing_is_left_to_do() -> None:
    """A slow step of 1 is the base alone, to the bit."""
    for rule in (Adam(), Momentum()):
        around, alone = (make(r, arrays(START), dtype="float32") for r in (Lookahead(rule, 3, 1.0), rule))
        for _ in range(10):
            follow(around)
            follow(alone)
        assert_same_bits(held(around), held(alone))


def test_lookahead_leaves_alone_what_a_step_leaves_out() -> None:
    """Tensors and, where the base has lazy rows, rows; they return when they have a gradient at a later sync."""
    session = make(Lookahead(Sgd(lr=1.0), 2, 0.5), {"a": [0.0], "b": [0.0], "c": [[0.0], [0.0]]})
    everything = {"a": np.ones(1), "b": np.ones(1), "c": np.ones((2, 1))}
    step(session, everything)
    step(session, {"a": np.ones(1), "c": Rows(np.array([1]), np.ones((1, 1)))}, partial=True)
    assert held(session).tolist() == [-1.0, -1.0, -1.0, -1.0]
    assert session.state.slots["lag"].tolist() == [0.0, 1.0, 1.0, 0.0]
    step(session, everything)
    step(session, everything)
    assert held(session).tolist() == [-2.0, -1.5, -1.5, -2.0]


def test_lookahead_leaves_frozen_tensors_alone() -> None:
    session = make(Lookahead(Sgd(lr=1.0), 2, 0.5), {"a": [-0.0], "b": [0.0]}, groups=[Group("a", {}, frozen=True)])
    for _ in range(4):
        step(session, {"a": np.ones(1), "b": np.ones(1)})
    assert_same_bits(held(session), np.array([-0.0, -2.0]))
    assert not session.state.slots["lag"].any()


def test_new_parameters_move_slow_and_fast_weights_together() -> None:
    session = make(Lookahead(Sgd(lr=1.0), 2, 0.5), {"a": [0.0]})
    step(session, {"a": np.ones(1)})
    session.apply(session.check(NewParams({"a": np.array([10.0])})))
    step(session, {"a": np.ones(1)})  # slow 11, fast 9
    assert held(session).tolist() == [10.0]


def test_lookahead_returns_from_where_the_fast_weights_were_put() -> None:
    """Pressed against the end of a box they do not move, so there is no way back to go."""
    box = {"kind": "project", "onto": "box", "low": 0.0, "high": 1.0}
    session = make(Lookahead(Sgd(lr=1.0), 3, 0.5), {"a": [0.0], "b": [0.75]}, transforms=[box])
    seen = []
    for _ in range(6):
        step(session, {"a": np.ones(1), "b": np.full(1, 0.5)})
        seen.append(held(session).tolist())
    # b: fast 0.25, 0, 0, and halfway back to 0.75; then 0, 0, 0, and halfway back to 0.375.
    assert seen == [[0.0, b] for b in (0.25, 0.0, 0.375, 0.0, 0.0, 0.1875)]


def test_rows_of_a_lazy_base_stay_rows() -> None:
    start = {"w": np.ones((4, 2))}
    session = make(Lookahead(SparseAdam(lr=0.1), 2, 0.5), start)
    step(session, {"w": Rows(np.array([1]), np.ones((1, 2)))})
    step(session, {"w": Rows(np.array([3]), np.ones((1, 2)))})
    w = session.layout.views(held(session))["w"]
    assert (w[[0, 2]] == 1.0).all()
    assert ((w[[1, 3]] > 0.89) & (w[[1, 3]] < 0.99)).all()  # half of the way of two steps, of which one was not theirs
    assert not session.state.slots["m"][:2].any()


def test_the_way_back_may_be_a_schedule_and_is_counted_by_moves() -> None:
    session = make(Lookahead(Sgd(lr=1.0), 1, Linear(1.0, 0.0, 2)), {"a": [0.0]},
                   transforms=[{"kind": "accumulate", "steps": 2}])  # fmt: skip
    seen = []
    for _ in range(8):
        step(session, {"a": np.ones(1)})
        seen.append(held(session).item())
    assert seen == [0.0, -1.0, -1.0, -1.5, -1.5, -1.5, -1.5, -1.5]


# SAM


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("name", BASES)
def test_sam_by_hand(name: str, adaptive: bool) -> None:
    """Algorithm 1 of the paper, and ASAM's: e = rho T² g / |T g| with T the sizes of the parameters."""
    base, by_hand = BASES[name]
    session, go, p = make(Sam(base, 0.2, adaptive), arrays(START)), by_hand(), START
    for _ in range(6):
        g = gradient_at(p)
        scale = {n: [abs(x) if adaptive else 1.0 for x in p[n]] for n in p}
        scaled = {n: [a * x for a, x in zip(scale[n], g[n], strict=True)] for n in p}
        e = {n: [0.2 * a * x / size(scaled) for a, x in zip(scale[n], scaled[n], strict=True)] for n in p}
        assert_close(follow(session), p)
        there = plus(p, e)
        assert_close(floats(session, session.next_point()), there)
        p = plus(p, go(p, gradient_at(there), loss_at(there)))
        assert_close(follow(session), p)
        assert_same_bits(session.next_point(), held(session))
    assert (session.state.step, session.state.moves) == (12, 6)


def test_sam_counts_bias_corrections_and_schedules_by_moves() -> None:
    rule = Adam(lr=Linear(0.1, 0.0, 2))
    session, alone = make(Sam(rule, 0.0), arrays(START)), make(rule, arrays(START))
    for _ in range(4):
        follow(session)
        follow(session)
        follow(alone)
        assert_same_bits(held(session), held(alone))


def test_averaging_counts_moves() -> None:
    session = make(Sam(Sgd(lr=1.0), 0.0), {"a": [0.0]}, averaging=Polyak())
    for _ in range(6):
        step(session, {"a": np.ones(1)})
    assert session.final_point().tolist() == [-2.0]


@pytest.mark.parametrize(("dtype", "scale"), [("float32", 1e-44), ("float32", 1e38), ("float64", 1e-310),
                                              ("float64", 1e300), ("float64", 0.0), ("float32", 1.0)])  # fmt: skip
@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_climbs_by_rho_whatever_the_gradients_size(adaptive: bool, dtype: str, scale: float) -> None:
    session = make(Sam(Sgd(lr=0.0), 0.5, adaptive), {"a": [1.0, 1.0], "b": [1.0]}, dtype=dtype)
    step(session, {"a": np.array([scale, 0.0]), "b": np.array([-scale])})
    share = 0.5 / math.sqrt(2) if scale else 0.0
    found = session.next_point() - held(session)
    np.testing.assert_allclose(found, [share, 0.0, -share], rtol=0.1 if scale == 1e-310 else 1e-6)


def test_sam_stays_finite_where_adaptive_sizes_overflow() -> None:
    session = make(Sam(Sgd(lr=0.0), adaptive=True), {"a": [1e30, 1.0]}, dtype="float32")
    step(session, {"a": np.array([1e30, 1.0])})
    assert np.isfinite(session.next_point()).all()


def test_between_two_climbs_the_next_point_is_the_parameters() -> None:
    """To the bit, and whatever climb is left over from before a tensor was frozen."""
    session = make(Sam(Sgd(lr=0.0), 1.0), {"a": [-0.0], "b": [0.0]})
    ones = {"a": np.ones(1), "b": np.ones(1)}
    assert_same_bits(session.next_point(), np.array([-0.0, 0.0]))
    step(session, ones)
    free = session.recipe
    for recipe in (replace(free, groups=(Group("a", {}, frozen=True),)), free):
        session.apply(session.check(NewRecipe(recipe)))
        if recipe is not free:
            assert session.next_point()[0] == 0.0
            step(session, ones)
    assert_same_bits(session.next_point(), held(session))


def test_sam_needs_all_live_tensors_and_holds_the_parameters() -> None:
    session = make(Sam(Sgd()), {"a": [0.0], "b": [0.0]}, groups=[Group("b", {}, frozen=True)])
    with pytest.raises(MissingGradient):
        step(session, {"b": np.ones(1)}, partial=True)
    step(session, {"a": np.ones(1)}, partial=True)
    with pytest.raises(ParamsRequired, match="sam"):
        step(make(Sam(Sgd()), {"a": [0.0]}, held=False), {"a": np.ones(1)})


def test_rows_climb_as_the_whole_tensor() -> None:
    start = {"w": np.ones((3, 2))}
    sparse, dense = make(Sam(Adam()), start), make(Sam(Adam()), start)
    for row in (0, 2, 2, 1):
        g = np.zeros((3, 2))
        g[row] = [1.0, -2.0]
        step(sparse, {"w": Rows(np.array([row]), g[[row]])})
        step(dense, {"w": g})
        assert_same_bits(sparse.next_point(), dense.next_point())
    assert_same_state(sparse.state, dense.state)


def test_a_cut_between_climb_and_step_goes_on_with_the_same_bits() -> None:
    session = make(Lookahead(Sam(AdamW(), 0.3), 2), arrays(START), dtype="float32")
    for _ in range(5):
        follow(session)
    tensors = {name: array.copy() for name, array in tensors_of(session.recipe, session.state).items()}
    state = state_of(session.recipe, 5, tensors, session.state.moves)
    assert session.state.moves == 2
    assert tensors[":climbing"] == 1.0
    restored = Session(session.recipe, state, Evaluator())
    for _ in range(5):
        follow(session)
        follow(restored)
    assert_same_state(session.state, restored.state)


# Both


@pytest.mark.parametrize("outside", [Lookahead, Sam])
def test_sam_within_lookahead_and_lookahead_within_sam(outside: type) -> None:
    """The same: lookahead goes by the moves."""
    base, by_hand = BASES["momentum"]
    rule = Lookahead(Sam(base, 0.1), 2, 0.5) if outside is Lookahead else Sam(Lookahead(base, 2, 0.5), 0.1)
    session, go = make(rule, arrays(START)), by_hand()
    slow = fast = START
    for t in range(1, 8):
        g = gradient_at(fast)
        there = plus(fast, g, 0.1 / size(g))
        fast = plus(fast, go(fast, gradient_at(there), 0.0))
        if t % 2 == 0:
            slow = plus(slow, plus(fast, slow, -1.0), 0.5)
            fast = slow
        follow(session)
        assert_close(follow(session), fast)


def test_each_schedule_is_resolved_by_its_own_path() -> None:
    """Plateaus of the wrappers, of what they wrap and of a group, all of which have come to something else."""
    halves, thirds = Plateau(0.5, factor=0.5, patience=0), Plateau(0.9, factor=1 / 3, patience=0)
    rule = Lookahead(Sam(Sgd(lr=Plateau(1.0, factor=0.25, patience=0)), rho=thirds), 1, halves)
    session = make(rule, {"a": [0.0], "b": [0.0]}, groups=[Group("b", {"lr": Plateau(1.0, factor=0.1, patience=0)})])
    paths = {"slow_step", "base.rho", "base.base.lr", "groups.0.lr"}
    assert set(session.recipe.plateaus) == paths

    for gradient in range(1, 7):
        # Losses that were no better, before this gradient: of each pair the one at the parameters counts.
        worse = max(gradient // 2 - 1, 0)
        before = held(session).copy()
        shown = session.preview(1)
        np.testing.assert_allclose(shown["/optimizer/slow_step"], [0.5 * 0.5**worse])
        np.testing.assert_allclose(shown["/optimizer/base/rho"], [0.9 / 3**worse])
        np.testing.assert_allclose(shown["/optimizer/base/base/lr"], [0.25**worse])
        np.testing.assert_allclose(shown["/groups/0/lr"], [0.1**worse])
        assert shown["lr"] == shown["/optimizer/base/base/lr"]
        step(session, {"a": np.array([3.0]), "b": np.array([4.0])}, loss=1.0)
        if gradient % 2:
            climbed = session.next_point() - before
            np.testing.assert_allclose(climbed, np.array([0.6, 0.8]) * 0.9 / 3**worse, rtol=1e-13)
            assert_same_bits(held(session), before)
        else:
            moved = 0.5 * 0.5**worse * np.array([-3.0 * 0.25**worse, -4.0 * 0.1**worse])
            np.testing.assert_allclose(held(session) - before, moved, rtol=1e-9)


def test_groups_speak_of_what_is_wrapped() -> None:
    session = make(Lookahead(Sgd(lr=1.0), 2, 0.5), {"a": [0.0], "b": [0.0]}, groups=[Group("b", {"lr": 3.0})])
    for _ in range(2):
        step(session, {"a": np.ones(1), "b": np.ones(1)})
    assert held(session).tolist() == [-1.0, -3.0]
    with pytest.raises(InvalidRecipe) as refused:
        make(Lookahead(Sgd()), {"a": [0.0]}, groups=[Group("a", {"sync_period": 2})])
    assert refused.value.pointer == "/groups/0/sync_period"


# Refused

REFUSED = {
    "lookahead": {"lookahead", "schedule_free", "lbfgs", "bfgs", "asgd", "dog", "prodigy"},
    "sam": {"sam", "lbfgs", "bfgs", "newton", "schedule_free"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrapper", REFUSED)
def test_what_can_be_wrapped(wrapper: str, kind: str) -> None:
    base = KINDS[kind]()
    if kind not in REFUSED[wrapper]:
        session = make(KINDS[wrapper](base=base), {"a": [1.0, 2.0]})
        assert session.recipe.method is (base if kind not in REFUSED else base.base)
        return
    with pytest.raises(InvalidRecipe, match=f"{wrapper} cannot wrap {kind}") as refused:
        KINDS[wrapper](base=base)
    assert refused.value.pointer == "/base/kind"


@pytest.mark.parametrize(
    ("make_rule", "pointer"),
    [
        (lambda: Sam(Lookahead(Sam())), "/base/base/kind"),
        (lambda: Lookahead(Sam(Lookahead())), "/base/base/kind"),
        (lambda: Lookahead(Sam(Asgd())), "/base/base/kind"),
        (lambda: Sam(Lookahead(Newton())), "/base/base/kind"),
        (lambda: Sam(Lookahead(Momentum(nesterov="lookahead"))), "/base/base/kind"),
        (lambda: Sam(Momentum(nesterov="lookahead")), "/base/kind"),
        (lambda: Sam(ScheduleFree()), "/base/kind"),
        (lambda: Lookahead("adam"), "/base"),
        (lambda: Lookahead(sync_period=0), "/sync_period"),
        (lambda: Lookahead(slow_step=1.5), "/slow_step"),
        (lambda: Lookahead(slow_step=Linear(0.0, 1.5, 3)), "/slow_step"),
        (lambda: Sam(rho=-0.1), "/rho"),
    ],
)
def test_refused_however_deep(make_rule: Callable[[], Optimizer], pointer: str) -> None:
    with pytest.raises(InvalidRecipe) as refused:
        make_rule()
    assert refused.value.pointer == pointer


def test_a_group_cannot_look_ahead_where_sam_does() -> None:
    with pytest.raises(InvalidRecipe) as refused:
        make(Sam(Momentum()), {"a": [0.0]}, groups=[Group("a", {"nesterov": "lookahead"})])
    assert refused.value.pointer == "/groups/0"


@pytest.mark.parametrize("rule", [Lookahead(Sam(Sgd())), Lookahead(Adam()), Sam(Momentum())], ids=str)
def test_the_kinds_of_a_chain_cannot_change(rule: Any) -> None:
    session = make(rule, {"a": [0.0]})
    before = picture(session)
    others = [replace(rule, base=AdamW()), rule.base, Lookahead(Sam(Momentum())), Sam(Lookahead(Sgd()))]
    for other in others:
        with pytest.raises(InvalidRecipe, match="kind"):
            session.check(NewRecipe(replace(session.recipe, optimizer=other)))
    assert picture(session) == before
    session.check(NewRecipe(replace(session.recipe, optimizer=rule.changed({"lr": 0.5}))))
