"""The optimizers, a family per file, simplest first.

descent          down the gradient, with and without a velocity
sign             its sign alone: signsgd, signum, lion, rprop
adaptive         a rate for each parameter: adagrad, adadelta, rmsprop
adam             a mean over the root of a mean square, and its closest kin
adam_variants    what others have made of it: laprop, adabelief, yogi, adopt
adam_momenta     with a second first moment: adan, ademamix
sophia           the same over the curvature
averaged         methods that are about the mean of where they were: asgd, schedule_free
proximal         ftrl
federated        a server's step on the mean of what its clients did
layerwise        a rate for each tensor: lars, lamb, novograd
factored         second moments by rows and columns: sm3, adafactor
muon             matrices as matrices: muon
preconditioned   a matrix for each axis: shampoo, soap
parameter_free   no rate to choose: polyak_sgd, dog, dadapt_adam, prodigy
second_order     newton
quasi_newton     bfgs, lbfgs, and their line_search
wrappers         around any of them: lookahead, sam

`KINDS` maps a kind's name to its class. A new kind is one class in one of these files.
"""

from core.optimizers import (
    adam,
    adam_momenta,
    adam_variants,
    adaptive,
    averaged,
    descent,
    factored,
    federated,
    layerwise,
    muon,
    parameter_free,
    preconditioned,
    proximal,
    quasi_newton,
    second_order,
    sign,
    sophia,
    wrappers,
)
from core.optimizers.rule import KINDS, ElementWise, Optimizer, TensorWise, Whole

FAMILIES = (
    descent,
    sign,
    adaptive,
    adam,
    adam_variants,
    adam_momenta,
    sophia,
    averaged,
    proximal,
    federated,
    layerwise,
    factored,
    muon,
    preconditioned,
    parameter_free,
    second_order,
    quasi_newton,
    wrappers,
)

# They registered themselves in the order of the imports between them; the catalogue lists them in the order above.
for family in FAMILIES:
    for kind in [kind for kind, cls in KINDS.items() if cls.__module__ == family.__name__]:
        KINDS[kind] = KINDS.pop(kind)

__all__ = ["FAMILIES", "KINDS", "ElementWise", "Optimizer", "TensorWise", "Whole"]
