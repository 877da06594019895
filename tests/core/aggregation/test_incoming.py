"""What becomes of a contribution before it counts: clipped, aged, compensated for its delay; and the noise of a round.

Sessions descend with a rate of 1 from 0, so that the parameters are minus the gradients of their steps.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from core.aggregation.aggregation import Aggregation, DelayCompensation
from core.aggregation.noise import gaussian
from core.aggregation.reducers import KINDS as REDUCERS
from core.aggregation.staleness import Hinge, Inverse
from core.contributions import Pull
from core.optimizers.descent import Sgd
from core.session import Session
from tests.core.aggregation.rounds import MAX64, flat, one, opened, round_of, rows, sync
from tests.core.build import assert_same_bits, close, held, step

# -- clipping and age -----------------------------------------------------------------------------------------------


def test_each_contribution_is_clipped_and_not_their_mean() -> None:
    sent = [[30.0, 40.0], [0.3, -0.4], [-6.0, 8.0]]
    found = round_of(sync(3, clip_norm=1.0), sent)
    np.testing.assert_allclose(found, [(0.6 + 0.3 - 0.6) / 3, (0.8 - 0.4 + 0.8) / 3], rtol=1e-15)


def test_the_norm_is_over_all_tensors() -> None:
    session = opened(sync(1, clip_norm=1.0))
    step(session, {"w": rows([0], 4.0), "b": np.array([4.0, 0.0]), "s": np.float64(4.0)}, payload="deltas")
    close(session)
    views = session.layout.views(flat(session))
    assert (views["w"][0].tolist(), views["b"][0], views["s"]) == ([-0.5, -0.5], -0.5, -0.5)


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200, MAX64 / 8])
def test_the_norm_of_what_is_very_large_or_small(scale: float) -> None:
    """Squares that are beyond float64, and a norm that is."""
    found = round_of(sync(1, clip_norm=scale / 2), [[4 * scale, 4 * scale, -4 * scale, 4 * scale]])
    np.testing.assert_allclose(found / scale, [0.25, 0.25, -0.25, 0.25], rtol=1e-12)
    found = round_of(sync(1, clip_norm=1.0), [[8 * scale] * 16])
    np.testing.assert_allclose(found, min(8 * scale, 0.25), rtol=1e-12)


def test_the_age_scales_and_does_not_weigh() -> None:
    """FedBuff: (1/K) Σ s(τ) Δ; were it a weight, two of one age would be as if they were fresh."""
    aggregation = Aggregation(mode="buffered", size=2, staleness=Hinge(a=1.0, b=1.0))
    session = opened(aggregation, {"w": [0.0]})
    session.state.step = 4
    step(session, one([6.0]), base_step=1)
    step(session, one([3.0]), base_step=1, weight=2.0)
    assert close(session).step == 5
    assert flat(session)[0] == pytest.approx((6 / 3 + 2 * 3 / 3) / 3, rel=1e-15)


def test_a_nan_is_no_way_around_the_clip() -> None:
    """The rest of such a contribution is brought down as well."""
    found = round_of(sync(2, clip_norm=1.0), [[np.nan, 3e30, 4e30], [0, 0, 0]], transforms=[{"kind": "zero_nans"}])
    np.testing.assert_allclose(found, [0.0, 0.3, 0.4], rtol=1e-15)


def compensated(session: Session, worker: str, g: Sequence[float], **members: Any) -> None:
    """A step that may write over the parameters, as those of small sessions do."""
    step(session, one(g), worker=worker, fresh=False, **members)


@pytest.mark.parametrize("payload", ["gradients", "deltas"])
def test_the_delay_is_compensated_from_what_that_worker_pulled(payload: str) -> None:
    """DC-ASGD: g + λ g ⊙ g ⊙ (w - w_bak(worker)); of deltas the same of -delta."""
    lam, sign = 0.5, {"gradients": 1.0, "deltas": -1.0}[payload]
    start = np.array([1.0, -2.0])
    session = opened(Aggregation(delay_compensation=DelayCompensation(lam)), {"w": start}, optimizer=Sgd(lr=0.25))
    x, backups = start.copy(), {name: start.copy() for name in "abc"}
    for name in "abc":
        session.apply(session.check(Pull(name, 1.0)))
    for index, name in enumerate("aabacb"):
        g = np.array([1.5, -0.5]) * (1 + index)
        pulls = index % 2 == 0
        compensated(session, name, (sign * g).tolist(), payload=payload, pulls=pulls)
        x = x - 0.25 * (g + lam * g * g * (x - backups[name]))
        if pulls:
            backups[name] = x.copy()
        np.testing.assert_allclose(held(session), x, rtol=1e-14)
    assert len({backup.tobytes() for backup in backups.values()}) == 3


def test_the_adaptive_compensation() -> None:
    """λ / √(MS + 1e-7), MS a running mean of g ⊙ g as they were sent, over all workers."""
    lam, decay = 2.0, 0.75
    session = opened(
        Aggregation(delay_compensation=DelayCompensation(lam, adaptive=True, decay=decay)), {"w": [1.0, -2.0]},
        optimizer=Sgd(lr=0.25),
    )  # fmt: skip
    x, backup, square = np.array([1.0, -2.0]), np.array([1.0, -2.0]), np.zeros(2)
    session.apply(session.check(Pull("a", 1.0)))
    for index in range(4):
        g = np.array([1.5, -0.5]) * (1 + index)
        compensated(session, "a", g.tolist())
        square = decay * square + (1 - decay) * g * g
        x = x - 0.25 * (g + lam / np.sqrt(square + 1e-7) * g * g * (x - backup))
        np.testing.assert_allclose(held(session), x, rtol=1e-14)


def test_what_is_not_finite_is_not_remembered_by_the_adaptive_compensation() -> None:
    """Else a parameter for which one NaN came would never move again."""
    aggregation = Aggregation(delay_compensation=DelayCompensation(adaptive=True))
    session = opened(aggregation, {"w": [0.0, 0.0]}, transforms=[{"kind": "zero_nans"}])
    for g in ([np.nan, 1.0], [1.0, 1.0]):
        compensated(session, "a", g)
    np.testing.assert_allclose(session.state.delays.mean_square, [0.05, 0.05 + 0.95 * 0.05], rtol=1e-14)
    np.testing.assert_array_equal(flat(session), [1.0, 2.0])


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("g", [1e200, -MAX64])
def test_a_compensation_beyond_float64_is_finite(g: float, adaptive: bool) -> None:
    aggregation = Aggregation(delay_compensation=DelayCompensation(adaptive=adaptive))
    session = opened(aggregation, {"w": [1.0, 1.0, 1.0]})
    session.apply(session.check(Pull("a", 1.0)))
    step(session, one([4.0, 4.0, 0.0]), worker="b")
    compensated(session, "a", [g, 0.0, g])
    assert np.isfinite(held(session)).all()
    assert held(session)[2] == 1.0 - g, "it did not move meanwhile"


def test_the_order_of_what_is_done_to_a_contribution() -> None:
    """Compensated, then clipped, then scaled by its age: any other order gives another number."""
    aggregation = Aggregation(
        mode="ssp", bound=9, delay_compensation=DelayCompensation(0.5), clip_norm=2.0, staleness=Inverse()
    )
    session = opened(aggregation, {"w": [1.0, 1.0]})
    session.apply(session.check(Pull("a", 1.0)))
    step(session, one([-3.0, -4.0]), worker="b", base_step=0, at=1.0)
    x = np.array([1.0, 1.0]) + 2 * np.array([0.6, 0.8])
    np.testing.assert_allclose(held(session), x, rtol=1e-15)
    g = np.array([1.0, 2.0])
    compensated_g = g + 0.5 * g * g * (x - 1.0)
    assert np.linalg.norm(g) > 2
    step(session, one(g.tolist()), worker="a", base_step=0, at=1.0)
    expected = x - 2 * compensated_g / np.linalg.norm(compensated_g) / 2
    np.testing.assert_allclose(held(session), expected, rtol=1e-15)


Z, S, SEED = 0.5, 3.0, 11


@pytest.mark.parametrize(("kind", "deviation"), [("mean", Z * S / 4), ("sum", Z * S)])
def test_the_noise_of_a_round(kind: str, deviation: float) -> None:
    size = 50_000
    aggregation = sync(4, reduce=REDUCERS[kind](), clip_norm=S, noise_multiplier=Z, seed=SEED)
    sent = [np.full(size, value) for value in (1.0, 0.0, -1e-3, 2e-3)]
    sessions = [opened(aggregation, {"w": np.zeros(size)}) for _ in range(2)]
    for session in sessions:
        for g in sent:
            step(session, {"w": g})
        close(session)
    assert_same_bits(held(sessions[0]), held(sessions[1]))
    scaled = [g * min(1.0, S / (abs(g[0]) * math.sqrt(size))) if g[0] else g for g in sent]
    noise = flat(sessions[0]) - sum(scaled) / (4 if kind == "mean" else 1)
    np.testing.assert_allclose(noise, deviation * gaussian(size, SEED, 1, "w"), atol=1e-14)
    assert abs(noise.std() / deviation - 1) < 5 / math.sqrt(2 * size)
    assert abs(noise.mean() / deviation) < 5 / math.sqrt(size)
    for g in sent:
        step(sessions[0], {"w": g})
    close(sessions[0])
    other = held(sessions[1]) - held(sessions[0]) - sum(scaled) / (4 if kind == "mean" else 1)
    assert abs(np.corrcoef(noise, other)[0, 1]) < 5 / math.sqrt(size), "the next round has noise of its own"


def test_the_noise_is_by_how_many_contributed() -> None:
    aggregation = sync(4, timeout=1.0, quorum=2, clip_norm=S, noise_multiplier=Z, seed=SEED)
    found = round_of(aggregation, [[0.0] * 3, [0.0] * 3])
    np.testing.assert_allclose(found, Z * S / 2 * gaussian(3, SEED, 1, "w"), rtol=1e-15)


def test_rows_get_their_noise_everywhere() -> None:
    """Where there is none tells which rows were named."""
    session = opened(sync(1, clip_norm=S, noise_multiplier=Z, seed=SEED), {"w": np.zeros((4, 2))})
    step(session, {"w": rows([1], 1.0)})
    close(session)
    expected = Z * S * gaussian(8, SEED, 1, "w") + [0, 0, 1, 1, 0, 0, 0, 0]
    np.testing.assert_allclose(flat(session), expected, rtol=1e-15)


def test_a_step_of_its_own_has_noise_as_a_round_of_one() -> None:
    noisy = {"clip_norm": S, "noise_multiplier": Z, "seed": SEED}
    alone, together = opened(Aggregation(**noisy), {"w": [0.0] * 3}), opened(sync(1, **noisy), {"w": [0.0] * 3})  # type: ignore[arg-type]
    for _ in range(2):
        step(alone, one([1.0, 5.0, 2.0]))
        step(together, one([1.0, 5.0, 2.0]))
        close(together)
    np.testing.assert_allclose(held(alone), held(together), rtol=1e-15)


@pytest.mark.parametrize("huge", [1e300, MAX64])
def test_noise_without_measure_is_finite(huge: float) -> None:
    aggregation = sync(1, clip_norm=huge, noise_multiplier=huge, seed=1)
    for dtype in ("float32", "float64"):
        assert np.isfinite(round_of(aggregation, [[0.0] * 9], dtype=dtype)).all()
