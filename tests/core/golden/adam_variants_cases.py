"""What grew out of Adam."""

import optax
import optax.contrib
from libraries import Case, by_optax, by_pytorch_optimizer
from pytorch_optimizer import ADOPT, AdaBelief, Adan, AdEMAMix, LaProp, Yogi

# pytorch_optimizer's LaProp adds 1e-15 under the root, whatever eps is; over several tensors it has float32 rates.
LAPROP = {"kind": "laprop", "lr": 0.01, "lr_in_velocity": True, "eps_hat": True, "eps_root": 1e-15}
BELIEF = {"kind": "adabelief", "lr": 0.01}
YOGI = {"kind": "yogi", "lr": 0.01}
ADOPT_ = {"kind": "adopt", "lr": 0.01, "clipping": "gradients"}
ADAN = {"kind": "adan", "lr": 0.01}
ADEMAMIX = {"kind": "ademamix", "lr": 0.01}

WHY = "it multiplies or divides by 1 ± lr · weight_decay in float32, whose rounding adds up; ours is nearer to float64"

CASES = {
    "pytorch_optimizer-laprop": Case(LAPROP, by_pytorch_optimizer(lambda p: LaProp(p, lr=0.01, foreach=False))),
    "pytorch_optimizer-laprop-eps": Case(
        LAPROP | {"eps": 0.01, "beta1": 0.8, "beta2": 0.99},
        by_pytorch_optimizer(lambda p: LaProp(p, lr=0.01, betas=(0.8, 0.99), eps=0.01, foreach=False)),
    ),
    "pytorch_optimizer-laprop-rate_outside": Case(
        LAPROP | {"lr_in_velocity": False},
        by_pytorch_optimizer(lambda p: LaProp(p, lr=0.01, foreach=False)),
    ),
    "pytorch_optimizer-laprop-centered": Case(
        LAPROP | {"centered": True},
        by_pytorch_optimizer(lambda p: LaProp(p, lr=0.01, centered=True, foreach=False)),
    ),
    "pytorch_optimizer-laprop-decay": Case(
        LAPROP | {"weight_decay": 0.1},
        by_pytorch_optimizer(lambda p: LaProp(p, lr=0.01, weight_decay=0.1, foreach=False)),
    ),
    "pytorch_optimizer-laprop-fixed_decay": Case(
        LAPROP | {"weight_decay": 0.1, "decay_scaling": "none", "centered": True},
        by_pytorch_optimizer(
            lambda p: LaProp(p, lr=0.01, weight_decay=0.1, fixed_decay=True, centered=True, foreach=False)
        ),
    ),
    "optax-adabelief": Case(BELIEF, by_optax(optax.adabelief(0.01))),
    "optax-adabelief-eps": Case(
        BELIEF | {"eps": 1e-3, "eps_root": 1e-2, "beta1": 0.8, "beta2": 0.99},
        by_optax(optax.adabelief(0.01, b1=0.8, b2=0.99, eps=1e-3, eps_root=1e-2)),
    ),
    "optax-adabelief-nesterov": Case(BELIEF | {"nesterov": True}, by_optax(optax.adabelief(0.01, nesterov=True))),
    "optax-adabelief-decay": Case(
        BELIEF | {"weight_decay": 0.1},
        by_optax(
            optax.chain(optax.scale_by_belief(), optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(0.01))
        ),
    ),
    "pytorch_optimizer-adabelief": Case(BELIEF, by_pytorch_optimizer(lambda p: AdaBelief(p, lr=0.01))),
    "pytorch_optimizer-adabelief-eps": Case(
        BELIEF | {"eps": 1e-3, "eps_root": 1e-3, "weight_decay": 0.1},
        by_pytorch_optimizer(lambda p: AdaBelief(p, lr=0.01, eps=1e-3, weight_decay=0.1)),
    ),
    "pytorch_optimizer-adabelief-fixed_decay": Case(
        BELIEF | {"weight_decay": 0.1, "decay_scaling": "none"},
        by_pytorch_optimizer(lambda p: AdaBelief(p, lr=0.01, weight_decay=0.1, fixed_decay=True)),
    ),
    "optax-yogi": Case(YOGI, by_optax(optax.yogi(0.01))),
    "optax-yogi-eps": Case(
        YOGI | {"eps": 1e-6, "eps_root": 1e-2, "beta2": 0.9, "initial_accumulator": 0.1, "initial_momentum": 0.1},
        by_optax(
            optax.chain(
                optax.scale_by_yogi(b2=0.9, eps=1e-6, eps_root=1e-2, initial_accumulator_value=0.1),
                optax.scale_by_learning_rate(0.01),
            )
        ),
    ),
    "pytorch_optimizer-yogi": Case(YOGI, by_pytorch_optimizer(lambda p: Yogi(p, lr=0.01))),
    "pytorch_optimizer-yogi-decay": Case(
        YOGI | {"weight_decay": 0.1, "beta1": 0.8, "beta2": 0.9},
        by_pytorch_optimizer(lambda p: Yogi(p, lr=0.01, betas=(0.8, 0.9), weight_decay=0.1)),
    ),
    "optax-adopt": Case({"kind": "adopt", "lr": 0.01}, by_optax(optax.contrib.adopt(0.01))),
    "optax-adopt-nesterov": Case(
        {"kind": "adopt", "lr": 0.01, "nesterov": True, "beta1": 0.8, "beta2": 0.99},
        by_optax(optax.contrib.adopt(0.01, b1=0.8, b2=0.99, nesterov=True)),
    ),
    "optax-adopt-unclipped": Case(
        {"kind": "adopt", "lr": 0.001, "clipping": "none", "eps": 0.1},
        by_optax(optax.contrib.adopt(0.001, eps=0.1, use_clipping=False)),
    ),
    "pytorch_optimizer-adopt": Case(ADOPT_, by_pytorch_optimizer(lambda p: ADOPT(p, lr=0.01))),
    "pytorch_optimizer-adopt-decay": Case(
        ADOPT_ | {"first_step": "decay", "weight_decay": 0.1},
        by_pytorch_optimizer(lambda p: ADOPT(p, lr=0.01, weight_decay=0.1, weight_decouple=True)),
        tolerance={"float32": 3e-6}, why=WHY,
    ),
    "optax-adan": Case(
        ADAN | {"difference_weight": "rest", "eps_root": 1e-8},
        by_optax(optax.adan(0.01)),
    ),
    "optax-adan-decay": Case(
        ADAN | {"difference_weight": "rest", "eps_root": 1e-2, "weight_decay": 0.1, "decay_form": "decoupled"},
        by_optax(optax.adan(0.01, eps_root=1e-2, weight_decay=0.1)),
    ),
    "pytorch_optimizer-adan": Case(ADAN, by_pytorch_optimizer(lambda p: Adan(p, lr=0.01))),
    "pytorch_optimizer-adan-proximal": Case(
        ADAN | {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.8, "beta3": 0.95, "eps": 1e-3},
        by_pytorch_optimizer(lambda p: Adan(p, lr=0.01, betas=(0.9, 0.8, 0.95), eps=1e-3, weight_decay=0.1)),
        tolerance={"float32": 3e-6}, why=WHY,
    ),
    "pytorch_optimizer-adan-decoupled": Case(
        ADAN | {"weight_decay": 0.1, "decay_form": "decoupled"},
        by_pytorch_optimizer(lambda p: Adan(p, lr=0.01, weight_decay=0.1, weight_decouple=True)),
        tolerance={"float32": 3e-6}, why=WHY,
    ),
    "optax-ademamix": Case(ADEMAMIX, by_optax(optax.contrib.ademamix(0.01))),
    "optax-ademamix-decay": Case(
        ADEMAMIX | {"alpha": 2.0, "beta3": 0.99, "eps": 1e-3, "eps_root": 1e-2, "weight_decay": 0.1},
        by_optax(optax.contrib.ademamix(0.01, b3=0.99, alpha=2.0, eps=1e-3, eps_root=1e-2, weight_decay=0.1)),
    ),
    "pytorch_optimizer-ademamix": Case(ADEMAMIX, by_pytorch_optimizer(lambda p: AdEMAMix(p, lr=0.01))),
    "pytorch_optimizer-ademamix-warmup": Case(
        ADEMAMIX | {"alpha_warmup": 40, "beta3_warmup": 40, "weight_decay": 0.1},
        by_pytorch_optimizer(
            lambda p: AdEMAMix(p, lr=0.01, t_alpha_beta3=40, weight_decay=0.1, weight_decouple=True)
        ),
    ),
}  # fmt: skip
