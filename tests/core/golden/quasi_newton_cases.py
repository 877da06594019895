"""L-BFGS without a line search by torch, and how far SciPy gets with how many evaluations with one.

torch's LBFGS makes several gradients a step; with max_iter 1 it makes one, and there is something to compare.
"""

from collections.abc import Callable

import numpy as np
import torch
from libraries import Array, Case, by_torch
from objectives import PROBLEMS, make_features, make_labels
from scipy.optimize import minimize

LBFGS = {"kind": "lbfgs"}

CASES: dict[str, Case] = {
    "torch-lbfgs": Case(
        LBFGS | {"lr": 0.01},
        by_torch(lambda p: torch.optim.LBFGS(p, lr=0.01, max_iter=1, history_size=10), closure=True),
    ),
    "torch-lbfgs-history": Case(
        LBFGS | {"lr": 0.001, "history": 3},
        by_torch(lambda p: torch.optim.LBFGS(p, lr=0.001, max_iter=1, history_size=3), closure=True),
    ),
}


def solved(name: str, method: str, **options: float) -> Callable[[], Array]:
    """SciPy's number of evaluations, the loss it reached, and the point: 2 + n numbers."""

    def solve() -> Array:
        objective, start = PROBLEMS[name]
        found = minimize(objective, np.array(start), jac=True, method=method, options=options)
        return np.array([found.nfev, found.fun, *found.x])

    return solve


def by_max_iter_1() -> Array:
    """torch's path (25, 20) on the logistic loss: unlike the gradients of CASES, its own depend on the steps."""
    objective, start = PROBLEMS["logistic"]
    x = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = torch.optim.LBFGS([x], lr=0.5, max_iter=1, history_size=3)
    seen = []

    def closure() -> torch.Tensor:
        loss, gradient = objective(x.detach().numpy())
        x.grad = torch.tensor(gradient)
        return torch.tensor(loss)

    for _ in range(25):
        optimizer.step(closure)
        seen.append(x.detach().numpy().copy())
    return np.stack(seen)


# name -> the array that golden.npz has as scipy/<name>
SCIPY: dict[str, Callable[[], Array]] = {
    "logistic/features": make_features,
    "logistic/labels": make_labels,
    "logistic/torch-lbfgs": by_max_iter_1,
    **{f"lbfgs/{name}": solved(name, "L-BFGS-B", maxcor=10) for name in PROBLEMS},
    **{f"bfgs/{name}": solved(name, "BFGS") for name in PROBLEMS},
}
