"""How much an old contribution counts, in exact numbers."""

import math
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.aggregation.staleness import STALENESS, Hinge, Inverse, Polynomial, Staleness
from core.errors import InvalidRecipe

AGES = st.integers(0, 2**53)


def test_inverse() -> None:
    assert [Inverse().factor(tau) for tau in (0, 1, 3, 9)] == [1.0, 0.5, 0.25, 0.1]


@given(st.integers(0, 10**9))
def test_inverse_by_fractions(tau: int) -> None:
    assert Inverse().factor(tau) == float(Fraction(1, 1 + tau))


def test_fedbuff_staleness_is_one_over_root_of_one_plus_tau() -> None:
    """1/√(1 + τ) of arXiv:2106.06639; 1/(1 + √τ), which some have in its place, gives 0.5, 1/3, 0.25 and 0.2 here."""
    found = [Polynomial().factor(tau) for tau in (0, 1, 4, 9, 16)]
    with localcontext() as context:
        context.prec = 50
        assert found == pytest.approx([float(1 / Decimal(1 + tau).sqrt()) for tau in (0, 1, 4, 9, 16)], rel=1e-15)
    assert found[0] == 1.0
    assert all(ours > 1 / (1 + math.sqrt(tau)) + 0.04 for ours, tau in zip(found[1:], (1, 4, 9, 16), strict=True))
    assert [Polynomial().factor(tau) for tau in (3, 8, 15, 99)] == [0.5, 1 / 3, 0.25, 0.1]


@pytest.mark.parametrize("a", [0.0, 0.25, 0.5, 0.75, 1.0, 2.0])
@pytest.mark.parametrize("tau", [0, 1, 2, 7, 1000, 10**9])
def test_polynomial_in_50_digits(a: float, tau: int) -> None:
    with localcontext() as context:
        context.prec = 50
        exact = (-Decimal(a) * Decimal(1 + tau).ln()).exp()
    assert Polynomial(a).factor(tau) == pytest.approx(float(exact), rel=1e-15)


def test_hinge() -> None:
    """FedAsync's a = 10, b = 4: whole up to 4, then 1/(10 · 1 + 1), 1/(10 · 2 + 1), …"""
    assert [Hinge().factor(tau) for tau in (0, 3, 4, 5, 6, 104)] == [1.0, 1.0, 1.0, 1 / 11, 1 / 21, 1 / 1001]
    assert [Hinge(0.5, 1.5).factor(tau) for tau in (1, 2, 3)] == [1.0, 1 / 1.25, 1 / 1.75]


@pytest.mark.parametrize(
    "kind", [Inverse(), Polynomial(), Polynomial(3.0), Polynomial(1e300), Hinge(), Hinge(1e308, 0.0)]
)
@given(older=AGES, newer=AGES)
def test_the_older_the_less_and_a_new_one_counts_whole(kind: Staleness, older: int, newer: int) -> None:
    newer, older = sorted((newer, older))
    assert 0.0 <= kind.factor(older) <= kind.factor(newer) <= 1.0
    assert kind.factor(0) == 1.0


def test_what_there_is() -> None:
    assert list(STALENESS) == ["inverse", "polynomial", "hinge"]


@pytest.mark.parametrize(
    ("cls", "members", "pointer"),
    [(Polynomial, {"a": -0.5}, "/a"), (Polynomial, {"a": float("inf")}, "/a"), (Hinge, {"a": -1.0}, "/a"),
     (Hinge, {"b": -1.0}, "/b"), (Hinge, {"b": True}, "/b")],
)  # fmt: skip
def test_options_out_of_bounds(cls: Any, members: dict[str, Any], pointer: str) -> None:
    with pytest.raises(InvalidRecipe) as refused:
        cls(**members)
    assert refused.value.pointer == pointer
