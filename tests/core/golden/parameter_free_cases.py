"""Methods that find their step size: optax, and pytorch_optimizer for what optax does not have."""

import optax
import torch
from libraries import Array, Case, Problem, Run, by_optax, by_pytorch_optimizer, counted
from optax import contrib
from pytorch_optimizer import DAdaptAdam, Prodigy


def in_double(run: Run) -> Run:
    """pytorch_optimizer keeps the estimate's sums in torch's default dtype: float32, unless it is told otherwise."""

    def ran(problem: Problem) -> Array:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return run(problem)
        finally:
            torch.set_default_dtype(before)

    return ran


POLYAK = {"kind": "polyak_sgd"}
DOG = {"kind": "dog"}
DADAPT = {"kind": "dadapt_adam"}
PRODIGY = {"kind": "prodigy"}
HALF = {"kind": "linear", "init": 1.0, "end": 0.1, "steps": 40}
to_half = counted(optax.linear_schedule(1.0, 0.1, 40))

CASES: dict[str, Case] = {
    "optax-polyak_sgd": Case(POLYAK, by_optax(optax.polyak_sgd(), loss=True), loss=True),
    # At other rates than 1 optax's differs from its own formula: it takes the norm of the gradient times the rate.
    "optax-polyak_sgd-bounded": Case(
        POLYAK | {"max_lr": 0.01, "eps": 0.1}, by_optax(optax.polyak_sgd(0.01, eps=0.1), loss=True), loss=True
    ),
    "optax-polyak_sgd-uphill": Case(
        POLYAK | {"f_min": 1.0}, by_optax(optax.polyak_sgd(f_min=1.0), loss=True), loss=True
    ),
    "optax-polyak_sgd-plus": Case(
        POLYAK | {"f_min": 1.0, "variant": "sps+"},
        by_optax(optax.polyak_sgd(f_min=1.0, variant="sps+"), loss=True),
        loss=True,
    ),
    "optax-dog": Case(DOG, by_optax(contrib.dog())),
    "optax-dog-reps_rel": Case(
        DOG | {"reps_rel": 1e-2, "eps": 1e-3, "lr": HALF},
        by_optax(contrib.dog(to_half, init_step=("heuristic", 1e-2), eps=1e-3)),
    ),
    "optax-dog-distance": Case(
        DOG | {"initial_distance": 0.5}, by_optax(contrib.dog(init_step=("distance", 0.5)))
    ),
    "optax-dadapt_adam": Case(DADAPT | {"use_bias_correction": True}, by_optax(contrib.dadapt_adamw())),
    "optax-dadapt_adam-betas": Case(
        DADAPT | {"use_bias_correction": True, "beta2": 0.5, "beta1": 0.5, "d0": 1e-3},
        by_optax(contrib.dadapt_adamw(betas=(0.5, 0.5), estim_lr0=1e-3)),
    ),
    "optax-dadapt_adam-decay": Case(
        DADAPT | {"use_bias_correction": True, "weight_decay": 0.1, "d0": 1e-3, "lr": HALF},
        by_optax(contrib.dadapt_adamw(to_half, estim_lr0=1e-3, weight_decay=0.1)),
    ),
    "pytorch_optimizer-dadapt_adam": Case(DADAPT, in_double(by_pytorch_optimizer(lambda p: DAdaptAdam(p)))),
    "pytorch_optimizer-dadapt_adam-growth": Case(
        DADAPT | {"growth_rate": 1.5, "d0": 1e-2, "weight_decay": 0.1},
        in_double(
            by_pytorch_optimizer(
                lambda p: DAdaptAdam(p, growth_rate=1.5, d0=1e-2, weight_decay=0.1, weight_decouple=True)
            )
        ),
    ),
    "pytorch_optimizer-dadapt_adam-fixed_decay": Case(
        DADAPT | {"weight_decay": 0.01, "decay_scaling": "none", "use_bias_correction": True, "beta1": 0.8},
        in_double(
            by_pytorch_optimizer(
                lambda p: DAdaptAdam(
                    p, betas=(0.8, 0.999), weight_decay=0.01, weight_decouple=True, fixed_decay=True,
                    bias_correction=True,
                )
            )
        ),
    ),
    "optax-prodigy": Case(PRODIGY | {"use_bias_correction": True}, by_optax(contrib.prodigy())),
    "optax-prodigy-growing": Case(
        PRODIGY | {"use_bias_correction": True, "beta3": 0.5, "d_coef": 2.0, "d0": 1e-2},
        by_optax(contrib.prodigy(beta3=0.5, estim_lr0=1e-2, estim_lr_coef=2.0)),
    ),
    "optax-prodigy-decay": Case(
        PRODIGY
        | {"use_bias_correction": True, "weight_decay": 0.1, "d0": 1e-3, "d_coef": 0.5, "beta3": 0.9, "lr": HALF},
        by_optax(contrib.prodigy(to_half, beta3=0.9, estim_lr0=1e-3, estim_lr_coef=0.5, weight_decay=0.1)),
    ),
    "optax-prodigy-safeguard_warmup": Case(
        PRODIGY | {"use_bias_correction": True, "safeguard_warmup": True, "lr": 0.5},
        by_optax(contrib.prodigy(0.5, safeguard_warmup=True)),
    ),
    "pytorch_optimizer-prodigy": Case(PRODIGY, in_double(by_pytorch_optimizer(lambda p: Prodigy(p)))),
    "pytorch_optimizer-prodigy-growth": Case(
        PRODIGY | {"growth_rate": 1.2, "weight_decay": 0.1, "d0": 0.05, "d_coef": 2.0, "beta3": 0.9},
        in_double(
            by_pytorch_optimizer(
                lambda p: Prodigy(p, growth_rate=1.2, weight_decay=0.1, d0=0.05, d_coef=2.0, beta3=0.9)
            )
        ),
    ),
    "pytorch_optimizer-prodigy-fixed_decay": Case(
        PRODIGY | {"weight_decay": 1e-3, "decay_scaling": "none", "safeguard_warmup": True, "d0": 0.02, "beta3": 0.9},
        in_double(
            by_pytorch_optimizer(
                lambda p: Prodigy(p, weight_decay=1e-3, fixed_decay=True, safeguard_warmup=True, d0=0.02, beta3=0.9)
            )
        ),
        tolerance={"float32": 2e-6},
        why="The library's float32 run is 1.3e-6 from its own float64 one, ours 4.0e-7.",
    ),
}  # fmt: skip
