"""What torch, optax, Keras and pytorch_optimizer say of muon, shampoo and soap.

torch and pytorch_optimizer iterate Muon's Newton-Schulz in bfloat16, and pytorch_optimizer decomposes SOAP's matrices
in float32. Three digits say little about the formulas, so both run in the dtype of the problem here: their code is
as it is, but what would round to the short dtype copies instead.
"""

from typing import Any
from unittest import mock

import keras
import optax
import pytorch_optimizer
import torch
from libraries import Array, Case, Problem, Run, by_keras, by_optax, by_pytorch_optimizer, by_torch
from pytorch_optimizer.optimizer.utils import matrix

MUON = torch.optim.Muon
OPTAX_MUON = {
    "kind": "muon",
    "lr": 0.01,
    "weight_decay": 0.0,
    "bias_correction": True,
    "eps_added": True,
    "eps": 1e-8,
    "adjust_lr_fn": "transposed",
    "adam_lr": 0.01,
}
OTHER_MUON = {"kind": "muon", "lr": 0.01, "weight_decay": 0.1}
SHAMPOO = {"kind": "shampoo", "lr": 0.1, "eps": 1.0}
PAIRS = SHAMPOO | {"block_size": 2, "beta2": 0.9}

# Theirs in float32 against theirs in float64; ours in float32 stays within 5e-7 of theirs in float64.
SHRUNK = {
    "tolerance": {"float32": 2e-6},
    "why": "torch multiplies the parameters by 1 - lr weight_decay, rounded in float32, at each step",
}


def inverse_roots(float64: float, float32: float) -> dict[str, Any]:
    why = "the library decomposes in the dtype of the problem, where roots of small eigenvalues lose digits"
    return {"tolerance": {"float64": float64, "float32": float32}, "why": why}


def not_rounded(run: Run, *names: str) -> Run:
    """`run`, its tensors staying in their dtype when they are asked to go to another by these methods."""

    def patched(problem: Problem) -> Array:
        with mock.patch.multiple(torch.Tensor, **dict.fromkeys(names, torch.Tensor.clone)):
            return run(problem)

    return patched


def by_muon(**options: Any) -> Run:
    """pytorch_optimizer's Muon."""
    iteration = matrix.zero_power_via_newton_schulz_5

    def run(problem: Problem) -> Array:
        dtype = torch.tensor(next(iter(problem.start.values()))).dtype
        defaults = tuple(dtype if value is torch.bfloat16 else value for value in iteration.__defaults__ or ())
        with mock.patch.object(iteration, "__defaults__", defaults):
            return by_pytorch_optimizer(lambda p: pytorch_optimizer.Muon([{"params": p, "use_muon": True}], **options))(
                problem
            )

    return run


def by_soap(**options: Any) -> Run:
    """pytorch_optimizer's SOAP.

    The first gradient of w leaves a plane empty, of which LAPACK gives any basis, and the update depends on it. Both
    get the same one here, that of Householder's reflections of the eigenvectors that there are.
    """
    decomposed = torch.linalg.eigh

    def filled(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, vectors = decomposed(gram)
        count = int((values > len(gram) * torch.finfo(gram.dtype).eps * values.max()).sum())
        return values, torch.linalg.qr(vectors.flip(1)[:, :count], mode="complete")[0].flip(1)

    def run(problem: Problem) -> Array:
        dtype = torch.tensor(next(iter(problem.start.values()))).dtype
        with mock.patch.object(torch, "float32", dtype), mock.patch.object(torch.linalg, "eigh", filled):
            return by_pytorch_optimizer(lambda p: pytorch_optimizer.SOAP(p, **options))(problem)

    return run


def by_blocks(**options: Any) -> Run:
    """pytorch_optimizer's ScalableShampoo as the paper's Shampoo by blocks of 2."""
    return by_pytorch_optimizer(
        lambda p: pytorch_optimizer.ScalableShampoo(
            p,
            lr=0.1,
            block_size=2,
            start_preconditioning_step=1,
            preconditioning_compute_steps=1,
            shape_interpretation=False,
            graft_type=0,
            use_svd=True,
            **options,
        )
    )


CASES: dict[str, Case] = {
    "torch-muon": Case(
        {"kind": "muon"}, not_rounded(by_torch(lambda p: MUON(p)), "bfloat16"), tensors=("w",), **SHRUNK
    ),
    "torch-muon-options": Case(
        {
            "kind": "muon",
            "lr": 0.01,
            "weight_decay": 0.01,
            "momentum": 0.8,
            "nesterov": False,
            "ns_a": 3.0,
            "ns_b": -3.2,
            "ns_c": 1.2,
            "ns_steps": 3,
            "eps": 0.1,
            "adjust_lr_fn": "match_rms_adamw",
        },
        not_rounded(
            by_torch(
                lambda p: MUON(
                    p,
                    lr=0.01,
                    weight_decay=0.01,
                    momentum=0.8,
                    nesterov=False,
                    ns_coefficients=(3.0, -3.2, 1.2),
                    ns_steps=3,
                    eps=0.1,
                    adjust_lr_fn="match_rms_adamw",
                )
            ),
            "bfloat16",
        ),
        tensors=("w",),
        **SHRUNK,
    ),
    "optax-muon": Case(OPTAX_MUON, by_optax(optax.contrib.muon(0.01), jit=True), tensors=("w",)),
    "optax-muon-decay-plain": Case(
        OPTAX_MUON | {"weight_decay": 0.1, "nesterov": False},
        by_optax(optax.contrib.muon(0.01, weight_decay=0.1, adam_weight_decay=0.1, nesterov=False), jit=True),
    ),
    "keras-muon": Case(
        {
            "kind": "muon",
            "lr": 0.01,
            "weight_decay": 0.1,
            "momentum_form": "heavy_ball",
            "eps_added": True,
            "adjust_lr_fn": "match_rms_adamw",
        },
        by_keras(lambda: keras.optimizers.Muon(0.01, weight_decay=0.1)),
        tensors=("w",),
        tolerance={"float64": 5e-9},
        why="Keras takes the root of the shape in float32",
    ),
    "pytorch_optimizer-muon-flatten": Case(
        OTHER_MUON | {"flatten": True},
        by_muon(lr=0.01, weight_decay=0.1),
        tensors=("w", "k"),
        **SHRUNK,
    ),
    "pytorch_optimizer-shampoo": Case(
        SHAMPOO,
        by_pytorch_optimizer(lambda p: pytorch_optimizer.Shampoo(p, lr=0.1, matrix_eps=1.0)),
        tensors=("w", "b", "k"),
    ),
    "pytorch_optimizer-shampoo-decay": Case(
        SHAMPOO | {"weight_decay": 0.1, "eps": 1e-4},
        by_pytorch_optimizer(
            lambda p: pytorch_optimizer.Shampoo(p, lr=0.1, matrix_eps=1e-4, weight_decay=0.1, weight_decouple=True)
        ),
        tensors=("w", "b", "k"),
        **inverse_roots(1e-13, 1e-5),
    ),
    "pytorch_optimizer-shampoo-blocks": Case(
        PAIRS | {"eps": 0.0, "momentum": 0.9},
        by_blocks(betas=(0.9, 0.9), matrix_eps=0.0, nesterov=False),
        tensors=("w", "k"),
        **inverse_roots(1e-12, 1e-3),
    ),
    "pytorch_optimizer-shampoo-blocks-nesterov": Case(
        PAIRS | {"eps": 0.0, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
        by_blocks(betas=(0.8, 0.9), matrix_eps=0.0, nesterov=True, weight_decay=0.1, decoupled_weight_decay=True),
        tensors=("w", "k"),
        **inverse_roots(1e-12, 1e-3),
    ),
    "pytorch_optimizer-soap": Case({"kind": "soap"}, by_soap(), **SHRUNK),
    "pytorch_optimizer-soap-options": Case(
        {
            "kind": "soap",
            "lr": 0.01,
            "beta1": 0.9,
            "beta2": 0.99,
            "shampoo_beta": 0.8,
            "eps": 1e-4,
            "interval": 3,
            "weight_decay": 0.1,
            "bias_correction": False,
            "normalize": True,
            "max_precond_dim": 3,
        },
        by_soap(
            lr=0.01,
            betas=(0.9, 0.99),
            shampoo_beta=0.8,
            eps=1e-4,
            precondition_frequency=3,
            weight_decay=0.1,
            correct_bias=False,
            normalize_gradient=True,
            max_precondition_dim=3,
        ),
        **SHRUNK,
    ),
    "pytorch_optimizer-soap-vectors": Case(
        {"kind": "soap", "precondition_1d": True},
        by_soap(precondition_1d=True),
        tensors=("b",),
        **SHRUNK,
    ),
}
