"""Follow the regularized leader."""

import keras
from libraries import Case, by_keras, by_pytorch_optimizer
from pytorch_optimizer import FTRL

# Keras's l2 is half of the paper's, and its beta is the paper's.
KERAS = {"kind": "ftrl", "lr": 0.1, "beta": 0.0, "initial_accumulator": 0.1}
PAPER = {"kind": "ftrl", "lr": 0.1, "beta": 1.0}

CASES = {
    "keras-ftrl": Case(KERAS, by_keras(lambda: keras.optimizers.Ftrl(0.1))),
    "keras-ftrl-l1": Case(
        KERAS | {"l1": 2.0, "l2": 0.2, "beta": 0.5},
        by_keras(
            lambda: keras.optimizers.Ftrl(0.1, l1_regularization_strength=2.0, l2_regularization_strength=0.1, beta=0.5)
        ),
    ),
    "keras-ftrl-shrinkage": Case(
        KERAS | {"l2_shrinkage": 0.1, "l1": 0.1, "initial_accumulator": 1.0},
        by_keras(
            lambda: keras.optimizers.Ftrl(
                0.1,
                initial_accumulator_value=1.0,
                l1_regularization_strength=0.1,
                l2_shrinkage_regularization_strength=0.1,
            )
        ),
    ),
    "pytorch_optimizer-ftrl": Case(PAPER, by_pytorch_optimizer(lambda p: FTRL(p, lr=0.1, beta=1.0))),
    "pytorch_optimizer-ftrl-l1": Case(
        PAPER | {"l1": 3.0, "l2": 0.5},
        by_pytorch_optimizer(lambda p: FTRL(p, lr=0.1, beta=1.0, lambda_1=3.0, lambda_2=0.5)),
    ),
}
