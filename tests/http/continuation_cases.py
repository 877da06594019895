"""The sessions whose continuation is tested: each kind, schedule, transform and reducer, and what they are made of."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from core.aggregation.aggregation import Aggregation
from core.optimizers import KINDS
from service.kinds import AGGREGATION, core_object

SHAPES: dict[str, tuple[int, ...]] = {"w": (3, 2), "e": (4, 2), "b": (3,), "s": ()}
SPLIT, CHANGE, KILL, END = 5, 6, 7, 10
SEED = 12345  # the one of tests.core.build


@dataclass(frozen=True)
class Case:
    """`body` is what the session is made of; the rest says what is unusual in the gradients that it gets."""

    body: Mapping[str, Any]
    held: bool = True
    rows: bool = False  # the gradient of e is row-sparse
    partial: Mapping[int, Sequence[str]] = field(default_factory=dict)  # step -> the tensors that it brings
    spoilt: Mapping[int, float] = field(default_factory=dict)  # step -> what stands in the place of a number
    diagonal_every: int = 1
    losses: str = "level"  # or "falling"
    then: Mapping[str, Any] = field(default_factory=dict)  # what a PATCH changes before the step CHANGE

    @property
    def dtype(self) -> str:
        return str(self.body.get("dtype", "float32"))

    @property
    def aggregation(self) -> Aggregation:
        made: Aggregation = core_object(AGGREGATION.model_validate(self.body.get("aggregation", {})))
        return made


def case(optimizer: Any, *, more: Mapping[str, Any] | None = None, **members: Any) -> Case:
    return Case({"optimizer": optimizer, **members}, **(more or {}))


# -- the cases -------------------------------------------------------------------------------------------------------

FALLING = {"kind": "linear", "init": 0.1, "end": 0.01, "steps": 8}
PLATEAU = {"kind": "plateau", "init": 0.1, "factor": 0.5, "patience": 1}
RATES: dict[str, dict[str, Any]] = {
    "constant": {"value": 0.1},
    "linear": {"init": 0.1, "end": 0.01, "steps": 8},
    "polynomial": {"init": 0.1, "end": 0.01, "steps": 8, "power": 2.0},
    "exponential": {"init": 0.1, "rate": 0.5, "steps": 3, "staircase": True},
    "inverse_time": {"init": 0.1, "rate": 0.5},
    "inverse_sqrt": {"peak": 0.1, "warmup_steps": 4},
    "step": {"init": 0.1, "steps": 3},
    "multi_step": {"init": 0.1, "milestones": [2, 6, 8]},
    "cosine": {"init": 0.1, "steps": 8},
    "piecewise_constant": {"values": [0.1, 0.2, 0.05], "boundaries": [3, 7]},
    "piecewise_linear": {"steps": [0, 4, 8], "values": [0.1, 0.2, 0.05]},
    "cosine_restarts": {"init": 0.1, "steps": 3, "mult": 2},
    "cyclic": {"init": 0.01, "peak": 0.1, "steps_up": 3},
    "one_cycle": {"peak": 0.1, "steps": 9},
    "warmup_cosine": {"peak": 0.1, "warmup_steps": 3, "steps": 9},
    "warmup_linear": {"peak": 0.1, "warmup_steps": 3, "steps": 9},
    "warmup_stable_decay": {"peak": 0.1, "warmup_steps": 2, "steps": 9, "decay_steps": 3},
    "sequence": {"parts": [FALLING, {"kind": "constant", "value": 0.3}], "boundaries": [6]},
    "product": {"parts": [FALLING, {"kind": "linear", "init": 0.0, "end": 1.0, "steps": 4}]},
    "plateau": {"init": 0.1, "factor": 0.5, "patience": 1},
}
ADAM = {"kind": "adam", "lr": 0.1}
MOMENTUM = {"kind": "momentum", "lr": 0.1}
GROUPS = [{"match": "[we]", "lr": 0.05, "beta1": 0.5}, {"match": "b", "frozen": True}]
TRANSFORMS: dict[str, list[dict[str, Any]]] = {
    "clip_by_global_norm": [{"max_norm": 1.0}],
    "clip_by_norm": [{"max_norm": 0.5}],
    "clip": [{"max_value": 0.5}, {"low": -0.1, "high": 1.0}],
    "adaptive_clip": [{"clipping": 0.1}],
    "normalize": [{}, {"per": "tensor", "eps": 1e-3}],
    "centralize": [{}, {"units": "last"}],
    "sign": [{}],
    "zero_nans": [{}],
    "unscale": [{"scale": 4.0}, {"scale": 4.0, "dynamic": True, "growth_interval": 2}],
    "weight_decay": [{"weight_decay": 0.1}],
    "l1": [{"l1": 0.1}],
    "add_noise": [{"eta": 0.1, "seed": 3}],
    "accumulate": [{"steps": 3}, {"steps": 2, "reduce": "sum"}],
    "ema": [{"decay": 0.9}, {"decay": 0.5, "debias": False}],
    "orthogonalize": [{}, {"exact": True}],
    "project": [
        {"onto": "simplex", "over": "rows"}, {"onto": "l1_ball"}, {"onto": "l2_ball", "over": "rows"},
        {"onto": "box", "low": -0.2, "high": 0.2}, {"onto": "non_negative"},
    ],
}  # fmt: skip
SPOILT: dict[str, dict[int, float]] = {"zero_nans": {4: np.nan, 8: np.nan}}


def _kinds() -> Iterator[tuple[str, Case]]:
    for kind in KINDS:
        for dtype in ("float32", "float64"):
            yield f"{kind}-{dtype}", case(kind, dtype=dtype)


def _wrappers() -> Iterator[tuple[str, Case]]:
    bases = [("elements", MOMENTUM), ("tensors", {"kind": "lamb", "lr": 0.1}), ("whole", {"kind": "polyak_sgd"})]
    for family, base in bases:
        yield f"lookahead-{family}", case({"kind": "lookahead", "base": base, "sync_period": 3})
        yield f"sam-{family}", case({"kind": "sam", "base": base})
    yield "sam-adaptive", case({"kind": "sam", "base": ADAM, "adaptive": True}, dtype="float64")
    yield "schedule_free-elements", case({"kind": "schedule_free", "base": {"kind": "sgd", "lr": 0.5}, "r": 1.0})
    inner = {"kind": "sam", "base": ADAM, "rho": 0.1}
    yield "lookahead-sam-adam", case({"kind": "lookahead", "base": inner, "sync_period": 2})
    outer = {"kind": "sam", "base": {"kind": "lookahead", "base": ADAM, "sync_period": 2}}
    yield "sam-lookahead-adam", case(outer, dtype="float64")


def _options() -> Iterator[tuple[str, Case]]:
    made: dict[str, dict[str, Any]] = {
        "amsgrad": {**ADAM, "amsgrad": "corrected"},
        "cautious": {**ADAM, "cautious": True},
        "cautious-decayed": {"kind": "adamw", "lr": 0.1, "weight_decay": 0.1, "cautious": True},
        "centered": {"kind": "rmsprop", "centered": True, "momentum": 0.9},
        "lookahead-form": {**MOMENTUM, "nesterov": "lookahead"},
        "full": {"kind": "adagrad", "lr": 0.1, "matrix": "full"},
        "searching": {"kind": "lbfgs", "line_search": "strong_wolfe", "history": 2},
        "not-searching": {"kind": "lbfgs", "lr": 0.1, "line_search": "none", "history": 3},
        "bfgs": {"kind": "bfgs", "lr": 0.1, "line_search": "none"},
        "soap": {"kind": "soap", "interval": 2},
        "shampoo": {"kind": "shampoo", "interval": 3, "block_size": 2},
    }
    for name, optimizer in made.items():
        yield f"option-{name}", case(optimizer)
    every_third = {"kind": "sophia", "interval": 3, "lr": 0.01}
    yield "option-sophia-interval", case(every_third, more={"diagonal_every": 3})


def _schedules() -> Iterator[tuple[str, Case]]:
    for kind, settings in RATES.items():
        yield f"rate-{kind}", case({"kind": "adam", "lr": {"kind": kind, **settings}})
    for name, value in (("falling", FALLING), ("plateau", PLATEAU)):
        yield f"momentum-{name}", case({**MOMENTUM, "momentum": value})
        yield f"beta1-{name}", case({**ADAM, "beta1": value})
        yield f"decay-{name}", case({"kind": "adamw", "lr": 0.1, "weight_decay": value})
        yield f"group-{name}", case(ADAM, groups=[{"match": "[we]", "lr": value}])
        yield f"transform-{name}", case(ADAM, transforms=[{"kind": "clip_by_global_norm", "max_norm": value}])
        yield f"base-{name}", case({"kind": "lookahead", "base": {**ADAM, "lr": value}, "sync_period": 3})
        yield f"tensors-{name}", case({"kind": "lamb", "lr": value})
        yield f"free-{name}", case({"kind": "schedule_free", "base": {"kind": "adamw", "lr": value}})
    both = {"kind": "plateau", "init": 0.5, "factor": 0.5, "patience": 0}
    yield "two-plateaus", case({**ADAM, "lr": PLATEAU, "beta1": both}, transforms=[{"kind": "accumulate", "steps": 2}])
    yield "plateau-that-does-not-fall", case({**ADAM, "lr": PLATEAU}, more={"losses": "falling"})


def _transforms() -> Iterator[tuple[str, Case]]:
    for kind, forms in TRANSFORMS.items():
        for index, settings in enumerate(forms):
            spoilt = {4: np.inf, 8: np.nan} if settings.get("dynamic") else SPOILT.get(kind, {})
            made = case(ADAM, transforms=[{"kind": kind, **settings}], more={"spoilt": spoilt})
            yield f"transform-{kind}-{index}", made
    several = [
        {"kind": "unscale", "scale": 2.0, "dynamic": True, "growth_interval": 1},
        {"kind": "ema", "decay": 0.5},
        {"kind": "accumulate", "steps": 2},
        {"kind": "ema", "decay": 0.9},
    ]
    yield "transforms", case(ADAM, transforms=several, dtype="float64", more={"spoilt": {4: -np.inf}})
    climbing = {"kind": "sam", "base": MOMENTUM}
    yield "accumulate-sam", case(climbing, transforms=[{"kind": "accumulate", "steps": 2}])


def _settings() -> Iterator[tuple[str, Case]]:
    compact = {"state_dtype": "bfloat16", "state_seed": SEED}
    yield "bfloat16-adam", case(ADAM, **compact)
    yield "bfloat16-float64", case(ADAM, dtype="float64", **compact)
    yield "bfloat16-cautious", case({**ADAM, "cautious": True}, **compact)
    yield "bfloat16-lookahead", case({"kind": "lookahead", "base": MOMENTUM, "sync_period": 3}, **compact)
    yield "bfloat16-rows", case({"kind": "sparse_adam", "lr": 0.1}, **compact, more={"rows": True})
    yield "bfloat16-groups", case(ADAM, groups=GROUPS, **compact)
    averages: dict[str, dict[str, Any]] = {
        "ema": {"kind": "ema", "decay": 0.9},
        "ema-first": {"kind": "ema", "decay": 0.9, "start": "first"},
        "polyak": {"kind": "polyak", "start": 6},
    }
    for name, average in averages.items():
        yield f"averaging-{name}", case(ADAM, averaging=average)
    yield (
        "averaging-accumulate",
        case(ADAM, averaging={"kind": "ema", "decay": 0.9}, transforms=[{"kind": "accumulate", "steps": 3}]),
    )
    yield "groups", case(ADAM, groups=GROUPS)
    yield "groups-scheduled", case(ADAM, groups=[{"match": "w", "lr": FALLING}, {"match": "s", "frozen": True}])
    yield "groups-of-a-whole", case({"kind": "lbfgs", "lr": 0.1}, groups=[{"match": "w", "lr": 0.01}])
    yield "groups-in-a-wrapper", case({"kind": "sam", "base": ADAM}, groups=GROUPS)
    partial = {3: ["w", "s"], 6: ["e"], 9: ["b", "w"]}
    for kind in ("adam", "lamb", "dog", "lookahead", "schedule_free"):
        yield f"partial-{kind}", case(kind, more={"partial": partial})
    yield "partial-ema", case(ADAM, averaging={"kind": "ema", "decay": 0.9}, more={"partial": partial})
    for kind in ("sgd", "adagrad", "sparse_adam", "adam", "lamb"):
        yield f"rows-{kind}", case({"kind": kind, "lr": 0.1}, more={"rows": True})
    clipped = [{"kind": "clip_by_global_norm", "max_norm": 0.5}]
    yield "rows-clipped", case({"kind": "adagrad", "lr": 0.1}, transforms=clipped, more={"rows": True})
    yield "rows-accumulated", case(MOMENTUM, transforms=[{"kind": "accumulate", "steps": 3}], more={"rows": True})


def _changed() -> Iterator[tuple[str, Case]]:
    """What is carried over where a session goes on otherwise, between the checkpoint and the kill."""
    two = {"kind": "accumulate", "steps": 2}
    ema = {"kind": "ema", "decay": 0.9}
    yield (
        "changed-transforms",
        case(
            ADAM,
            transforms=[ema, two],
            more={"then": {"transforms": [{"kind": "sign"}, two | {"steps": 4}, ema | {"decay": 0.5}]}},
        ),
    )
    sums = {"transforms": [two | {"reduce": "sum"}]}
    yield "changed-accumulation", case(ADAM, transforms=[two], more={"then": sums})
    centered = {"optimizer": {"kind": "rmsprop", "centered": True, "momentum": 0.5}}
    yield "changed-slots", case("rmsprop", more={"then": centered})
    yield "changed-compact-slots", case("rmsprop", state_dtype="bfloat16", state_seed=SEED, more={"then": centered})
    later = {"optimizer": {**ADAM, "lr": PLATEAU | {"patience": 3}, "beta1": PLATEAU}}
    yield "changed-plateaus", case({**ADAM, "lr": PLATEAU}, more={"then": later})
    begun = {"optimizer": {**ADAM, "lr": PLATEAU}}
    yield "changed-to-plateau", case(ADAM, more={"then": begun})
    groups = [{"match": "w", "lr": PLATEAU}, {"match": "b", "lr": PLATEAU | {"init": 0.3}}]
    yield "changed-groups", case(ADAM, groups=groups, more={"then": {"groups": groups[1:]}})
    base = {"kind": "sam", "base": {"kind": "lookahead", "base": ADAM, "sync_period": 2}}
    inner = {"optimizer": base | {"rho": 0.5, "base": {**base["base"], "sync_period": 3, "base": {**ADAM, "lr": 0.01}}}}
    yield "changed-base", case(base, more={"then": inner})


def _unheld() -> Iterator[tuple[str, Case]]:
    away = {"held": False}
    for kind in ("adam", "adamw", "lamb", "prodigy", "newton", "lbfgs", "lookahead"):
        yield f"unheld-{kind}", case(kind, more=away)
    yield "unheld-full", case({"kind": "adagrad", "matrix": "full"}, more=away)
    yield (
        "unheld-transforms",
        case(
            ADAM,
            transforms=[{"kind": "weight_decay", "weight_decay": 0.1}, {"kind": "accumulate", "steps": 3}],
            more=away,
        ),
    )
    yield "unheld-project", case(ADAM, transforms=[{"kind": "project", "onto": "l2_ball"}], more=away)
    yield "unheld-plateau", case({**ADAM, "lr": PLATEAU}, more=away)


def _shared() -> Iterator[tuple[str, Case]]:
    """After five and after seven contributions a round of three, or of four, is open."""
    three = {"mode": "sync", "workers": 3}
    buffered = {"mode": "buffered", "size": 4, "staleness": {"kind": "inverse"}, "clip_norm": 1.0}
    yield "shared-mean", case(ADAM, aggregation=three)
    yield "shared-sum", case(MOMENTUM, aggregation=buffered | {"reduce": "sum"}, dtype="float64")
    for reducer in ("median", "geometric_median", "trimmed_mean"):
        yield f"shared-{reducer}", case(ADAM, aggregation=three | {"reduce": reducer})
    for reducer in ("krum", "multi_krum", "bulyan"):
        yield f"shared-{reducer}", case(ADAM, aggregation={"mode": "sync", "workers": 8, "reduce": reducer})
    noise = {"clip_norm": 1.0, "noise_multiplier": 0.5, "seed": 3}
    yield "shared-noise", case(ADAM, aggregation=three | noise)
    yield "shared-noise-alone", case(ADAM, aggregation={"mode": "async", **noise})
    for kind in ("newton", "sophia", "polyak_sgd", "lbfgs"):
        yield f"shared-{kind}", case(kind, aggregation=three)
    yield "shared-rows", case({"kind": "sparse_adam", "lr": 0.1}, aggregation=three, more={"rows": True})
    yield "shared-partial", case(ADAM, aggregation=three, more={"partial": {4: ["w"], 5: ["w", "s"], 7: ["e"]}})
    yield "shared-unheld", case({"kind": "adamw", "lr": 0.1}, aggregation=three, more={"held": False})
    mended = [{"kind": "zero_nans"}]
    yield "shared-nans", case(ADAM, aggregation=three, transforms=mended, more={"spoilt": {5: np.nan, 7: np.nan}})
    faster = {"optimizer": {**ADAM, "lr": 0.5}}
    yield "shared-changed", case(ADAM, aggregation=three, more={"then": faster})
    for mode in ({"mode": "async"}, {"mode": "ssp", "bound": 2, "workers": 3}):
        delays = mode | {"delay_compensation": {"lambda": 0.5, "adaptive": mode["mode"] == "ssp"}}
        yield f"shared-delays-{mode['mode']}", case(MOMENTUM, aggregation=delays)


PARTS = (_kinds, _wrappers, _options, _schedules, _transforms, _settings, _changed, _unheld, _shared)
CASES = dict(pair for part in PARTS for pair in part())
