"""ε against arithmetic of the tests' own: the divergences of the papers, their conversion, and the exact curve."""

import math
import subprocess
import sys

import numpy as np
import pytest

from service import privacy
from service.privacy import available, epsilon

# The orders of dp_accounting.rdp, version 0.6.
ORDERS = [1 + x / 10 for x in range(1, 100)] + list(range(11, 64)) + [128, 256, 512, 1024]

needs_library = pytest.mark.skipif(not available(), reason="needs the extra privacy")


def converted(order: float, divergence: float, delta: float) -> float:
    """Canonne, Kamath & Steinke 2020 (arXiv:2004.00010), Proposition 12."""
    return divergence + (math.log(1 / delta) + (order - 1) * math.log(1 - 1 / order) - math.log(order)) / (order - 1)


def gaussian(z: float, steps: int, delta: float) -> float:
    """Mironov 2017 (arXiv:1702.07476), Corollary 3: alpha / (2 z^2) a step."""
    return max(0.0, min(converted(a, steps * a / (2 * z * z), delta) for a in ORDERS))


def sampled(z: float, steps: int, delta: float, q: float, *, moments: bool = False) -> float:
    """Mironov, Talwar & Zhang 2019 (arXiv:1908.10530), section 3.3, at whole orders: a sum of binomials.

    `moments`: by the conversion of the moments accountant (Abadi et al. 2016), which loses more.
    """
    found = []
    for a in range(2, 64):
        logarithms = [
            math.log(math.comb(a, k)) + (a - k) * math.log(1 - q) + k * math.log(q) + (k * k - k) / (2 * z * z)
            for k in range(a + 1)
        ]
        divergence = steps * float(np.logaddexp.reduce(logarithms)) / (a - 1)
        loss = math.log(1 / delta) / (a - 1)
        found.append(divergence + loss if moments else converted(a, divergence, delta))
    return min(found)


def exact_delta(z: float, steps: int, at: float) -> float:
    """Balle & Wang 2018 (arXiv:1805.06530), Theorem 8: the whole curve of the Gaussian mechanism."""

    def below(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    mu = math.sqrt(steps) / z
    return below(mu / 2 - at / mu) - math.exp(at) * below(-mu / 2 - at / mu)


@needs_library
@pytest.mark.parametrize("z", [0.5, 1.0, 2.3, 20.0])
@pytest.mark.parametrize("steps", [1, 7, 1000])
@pytest.mark.parametrize("delta", [1e-5, 1e-9])
def test_it_is_that_of_the_gaussian_mechanism(z: float, steps: int, delta: float) -> None:
    found, expected = epsilon(z, steps, delta), gaussian(z, steps, delta)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)
    if 1 < expected < 500:  # e to that is a float, and the library's orders lie close enough for it
        assert exact_delta(z, steps, found) < delta, "never below what is true"
        rho = steps / (2 * z * z)
        assert found < rho + 2 * math.sqrt(rho * math.log(1 / delta)), "and better than by zCDP, Bun & Steinke 2016"


@needs_library
@pytest.mark.parametrize(("z", "q", "steps"), [(4.0, 0.01, 10_000), (1.1, 0.004, 3000), (1.0, 0.1, 20)])
def test_sampling_amplifies_as_the_paper_says(z: float, q: float, steps: int) -> None:
    found, expected = epsilon(z, steps, 1e-5, q), sampled(z, steps, 1e-5, q)
    assert found is not None
    assert expected * 0.99 < found <= expected * (1 + 1e-9), "the library has the orders between as well"
    everyone = epsilon(z, steps, 1e-5)
    assert everyone is not None
    assert found < everyone / 5


@needs_library
def test_it_is_a_known_figure() -> None:
    """Abadi et al. 2016 (arXiv:1607.00133), section 3.2: q 0.01, sigma 4, delta 1e-5, T 10,000: 1.26, by strong
    composition 9.34. The conversion of today makes the same divergences worth less."""
    assert round(sampled(4.0, 10_000, 1e-5, 0.01, moments=True), 2) == 1.26
    found = epsilon(4.0, 10_000, 1e-5, 0.01)
    assert found is not None
    assert 0.9 < found < 1.26


@needs_library
@pytest.mark.parametrize("q", [1.0, 0.01])
def test_it_grows_with_the_steps_and_falls_with_noise_and_delta(q: float) -> None:
    by_steps = [epsilon(1.5, steps, 1e-5, q) for steps in (1, 2, 10, 100, 10_000, 10**9)]
    by_noise = [epsilon(z, 100, 1e-5, q) for z in (8.0, 4.0, 2.0, 1.0, 0.5)]
    by_delta = [epsilon(1.5, 100, delta, q) for delta in (1e-3, 1e-5, 1e-7, 1e-12)]
    for found in (by_steps, by_noise, by_delta):
        assert None not in found
        assert found == sorted(set(found)), "strictly"


def test_no_step_is_no_loss() -> None:
    assert epsilon(1.0, 0, 1e-5) == 0.0
    assert epsilon(1e-300, 0, 1e-5, 0.5) == 0.0


@needs_library
@pytest.mark.parametrize("q", [1.0, 0.5, 1e-6])
def test_any_noise_has_an_answer(q: float) -> None:
    assert epsilon(5e-324, 1, 1e-5, q) is None, "infinite"
    assert epsilon(1e-160, 1, 1e-5, q) is None
    for z in (1e-3, 1e8, 1e160, 1e308):
        found = epsilon(z, 10, 1e-5, q)
        assert found is not None
        assert found >= 0
    assert epsilon(1e308, 10, 1e-5, q) == 0.0


@needs_library
def test_much_noise_is_not_taken_for_perfect_privacy() -> None:
    """Divergences that rounding has made negative count as none at all."""
    steps = 10**15
    found = epsilon(1e6, steps, 1e-5, 0.5)
    assert found is not None
    assert found >= gaussian(1e6 / 0.5, steps, 1e-5) * 0.9, "much noise makes sampling a matter of q / z"


def test_the_service_starts_without_the_library() -> None:
    program = "import sys, service.privacy; print(sorted({'dp_accounting', 'scipy', 'absl'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@needs_library
def test_its_warnings_are_not_passed_on() -> None:
    """At these the library warns of orders at which its series does not converge."""
    program = "from service.privacy import epsilon; print(epsilon(3.0, 1, 1e-5, 0.5) > 0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("True\n", "")


@needs_library
def test_the_sampled_gaussian_is_worked_out_once() -> None:
    """It takes up to 150 ms, which a session would pay at every step."""
    before = privacy._one_step.cache_info()
    found = [epsilon(1.234, steps, 1e-5, 0.123) for steps in (10, 11, 12, 10)]
    assert found[0] == found[3] != found[1]
    after = privacy._one_step.cache_info()
    assert (after.misses - before.misses, after.hits - before.hits) == (1, 3)
