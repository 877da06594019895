"""The noise of a round: normal, the same again, and no other stream's."""

import hashlib

import numpy as np

from core.aggregation.noise import gaussian
from core.transforms.noise import normal
from tests.core.build import assert_same_bits


def test_its_moments_are_those_of_the_normal_distribution() -> None:
    found, size = gaussian(100_000, 7, 1, "w"), 100_000
    assert found.shape == (size,)
    assert found.dtype == np.float64
    # Five standard errors; the seed is fixed, so that this passes or fails for good.
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((found**power).mean() - moment) < 5 * (variance / size) ** 0.5
    assert abs((found[1:] * found[:-1]).mean()) < 5 / size**0.5


def test_the_same_three_give_the_same_bits() -> None:
    assert_same_bits(gaussian(1000, 3, 5, "w"), gaussian(1000, 3, 5, "w"))
    assert_same_bits(gaussian(10, 3, 5, "w"), gaussian(1000, 3, 5, "w")[:10])
    assert gaussian(0, 3, 5, "w").shape == (0,)


def test_other_seeds_steps_and_names_give_other_noise() -> None:
    of = [(0, 1, "w"), (1, 1, "w"), (0, 2, "w"), (0, 1, "b"), (0, 11, "w"), (2**53 - 1, 1, "w"), (0, 1, "1:w")]
    streams = [gaussian(1000, *three) for three in of]
    assert np.abs(np.corrcoef(streams) - np.eye(len(streams))).max() < 5 / 1000**0.5


def test_it_is_not_the_noise_of_the_transform() -> None:
    """A session may have both, with one seed: were they one, the sum would be twice the noise and not sqrt(2) times."""
    both = [gaussian(1000, 0, 1, "w"), normal(1000, 0, 1, "w"), normal(1000, 0, 1, "round"), normal(1000, 0, 1, "1:w")]
    assert np.abs(np.corrcoef(both) - np.eye(len(both))).max() < 5 / 1000**0.5


def test_the_stream_is_the_same_for_good() -> None:
    """A change of these breaks the replay of logs that are already written."""
    assert gaussian(3, 1, 2, "w").tolist() == [0.841442417273775, -0.19693386945097877, 0.7767398956245368]
    key = int.from_bytes(hashlib.blake2b(b"round:1:2:w", digest_size=16).digest(), "little")
    assert_same_bits(gaussian(3, 1, 2, "w"), np.random.Generator(np.random.Philox(key=key)).standard_normal(3))
