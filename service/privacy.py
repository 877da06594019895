"""What the noise of a session's rounds is worth: ε of differential privacy, by the RDP accountant of `dp-accounting`.

A step releases Σ clip(gᵢ) + N(0, (z·S)²·I), S the norm that each contribution is clipped to and z the noise multiplier,
or that sum over the number n of contributions. Two histories are *neighbours* if they differ in what one worker sent:
its contributions are there in the one and zeros in the other, at most one in a step. The number n counts as public,
which is why dividing by it costs nothing. This is the relation that the library calls REPLACE_SPECIAL; for the Gaussian
mechanism, sampled or not, its figures are those of adding or removing one. To replace a worker's contributions by any
others moves the sum by up to 2·S: without sampling, that is the ε of half the noise multiplier.

The library is asked for the Rényi divergence of one step, at each of its orders. That is remembered: T steps have T
times as much, so a step costs the conversion to ε alone (0.12 ms), and not the sampled Gaussian again (up to 150 ms).
Its import takes a second, most of it SciPy's, so it waits until somebody asks.
"""

import logging
import math
from functools import lru_cache
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

# The library squares the noise multiplier and divides by it. Below this there is no privacy to speak of; more noise
# than this is accounted for as this.
LEAST, MOST = 1e-100, 1e100


def available() -> bool:
    """Whether the extra `privacy` is installed. Without it `epsilon` raises ModuleNotFoundError."""
    return find_spec("dp_accounting") is not None


def epsilon(noise_multiplier: float, steps: int, delta: float, sampling_rate: float = 1.0) -> float | None:
    """ε at `delta` (0 < delta < 1) of `steps` steps with noise of `noise_multiplier` (> 0) times the clip norm.

    `sampling_rate` (0 < q <= 1): the probability with which each worker is in a step, drawn anew and independently for
    each worker and step (Poisson sampling; Mironov et al. 2019, arXiv:1908.10530). The divergence becomes ε by
    Proposition 12 of Canonne, Kamath & Steinke 2020 (arXiv:2004.00010). None: no finite ε. The first call in a process
    imports the library; raises ModuleNotFoundError where it is not installed.
    """
    if steps == 0:
        return 0.0
    from dp_accounting.rdp import compute_epsilon

    orders, divergence = _one_step(float(noise_multiplier), float(sampling_rate))
    found = float(compute_epsilon(orders, steps * divergence, delta)[0])
    return found if math.isfinite(found) else None


@lru_cache(maxsize=1024)
def _one_step(noise_multiplier: float, sampling_rate: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The library's orders α, and the Rényi divergence of one step at each of them."""
    from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    # It warns of each order at which its series does not converge, and leaves that order out, which is sound.
    logging.getLogger("absl").setLevel(logging.ERROR)
    accountant = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_SPECIAL)
    orders = np.array(accountant._orders)
    if noise_multiplier < LEAST:
        return orders, np.full(orders.shape, np.inf)
    event = GaussianDpEvent(min(noise_multiplier, MOST))
    accountant.compose(event if sampling_rate == 1 else PoissonSampledDpEvent(sampling_rate, event))
    divergence = np.array(accountant._rdp)
    # Lost in rounding, under much noise. The library would take what is below zero for perfect privacy.
    divergence[~(divergence >= 0)] = np.inf
    return orders, divergence
