"""FedOpt's three: no library of the oracles has their form, see test_federated_arithmetic.py.

What agrees is where two kinds meet: without momentum fedadagrad is Adagrad and fedadam is RMSProp, from the same start.
(optax's Yogi corrects the bias, so that fedyogi has nobody to meet.)
"""

import optax
import torch
from libraries import Case, by_optax, by_torch

CASES: dict[str, Case] = {
    "torch-fedadagrad-adagrad": Case(
        {"kind": "fedadagrad", "lr": 0.1, "tau": 1e-3, "start": "zero"},
        by_torch(lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-3)),
    ),
    "torch-fedadagrad-initial": Case(
        {"kind": "fedadagrad", "lr": 0.1, "tau": 0.1},
        by_torch(lambda p: torch.optim.Adagrad(p, lr=0.1, eps=0.1, initial_accumulator_value=0.1 * 0.1)),
    ),
    "optax-fedadam-rmsprop": Case(
        {"kind": "fedadam", "lr": 0.01, "tau": 0.1, "beta1": 0.0},
        by_optax(optax.rmsprop(0.01, decay=0.99, eps=0.1, initial_scale=0.1 * 0.1, eps_in_sqrt=False)),
    ),
    "torch-fedadam-rmsprop": Case(
        {"kind": "fedadam", "lr": 0.01, "tau": 1e-3, "beta1": 0.0, "start": "zero"},
        by_torch(lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.99, eps=1e-3)),
    ),
}
