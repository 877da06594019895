"""Eight parameters: AdaGrad's full matrix by SciPy's matrix power, Newton's step by its Cholesky solver."""

import numpy as np
import scipy

random = np.random.default_rng(8)
GRADIENTS = random.normal(size=(12, 8))
HALF = random.normal(size=(8, 8))
HESSIAN = HALF @ HALF.T + np.eye(8)


def adagrad() -> np.ndarray:
    """(12, 8): lr 0.1, eps 1e-3, initial_accumulator 0.2, from 0."""
    total, params, seen = 0.2 * np.eye(8), np.zeros(8), []
    for g in GRADIENTS:
        total = total + np.outer(g, g)
        root = np.real(scipy.linalg.fractional_matrix_power(total + 1e-3 * np.eye(8), -0.5))
        params = params - 0.1 * root @ g
        seen.append(params)
    return np.stack(seen)


def newton(damping: float) -> np.ndarray:
    return -scipy.linalg.solve(HESSIAN + damping * np.eye(8), GRADIENTS[0], assume_a="pos")


SCIPY = {
    "dense-gradients": lambda: GRADIENTS,
    "dense-hessian": lambda: HESSIAN,
    "dense-adagrad": adagrad,
    "dense-newton": lambda: newton(0.0),
    "dense-newton-damped": lambda: newton(0.7),
}
