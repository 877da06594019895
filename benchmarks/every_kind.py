"""Every element-wise kind of the core in a process that is asked, line by line, for steps and for copies: C3.

    python -m benchmarks.every_kind SIZE

Says `{"version": …, "forms": […], "beside": […]}` once it is ready: the names of the forms, and of those that are
measured for information alone. Then it takes lines:

    take NAME       makes a session of this form, compiles its kernel; `{"bytes": …}` is what a step has to move
    apply N         N steps of it
    copy N          N copies between the halves of one array, which is as large as all that a step touches
    pass N          N passes over that array in place (a negation)

and answers the last three with `{"seconds": …}`, in sum. Those of a copy and of a pass are scaled, from the bytes
that they moved to those that N steps move. A step has to read the gradient, the parameters and the slots, and to write
the latter two.

All kinds are in it with their defaults, a new one at once, and those options beside that have a formula of their own.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from importlib.metadata import version
from typing import Any, Literal, NamedTuple

import numpy as np

from benchmarks.adam import say, timed
from core.contributions import Contribution
from core.evaluate import Evaluator, Spec
from core.layout import Array, Layout
from core.optimizers import KINDS, ElementWise, Optimizer
from core.optimizers.adam import Adam, AdamW
from core.optimizers.descent import Sgd
from core.optimizers.sophia import Sophia
from core.recipe import Recipe
from core.session import Session

_DECAY = {"weight_decay": 0.01}
# What has a formula of its own beside that of the defaults.
OPTIONS: Mapping[str, tuple[dict[str, Any], ...]] = {
    "momentum": ({"nesterov": True},),
    "lion": (_DECAY,),
    "rmsprop": ({"centered": True}, {"momentum": 0.9}, {"centered": True, "momentum": 0.9}),
    "adam": ({"nesterov": True}, {"amsgrad": "raw"}),
    "adamw": ({"nesterov": True}, {"amsgrad": "raw"}),
    "adamax": (_DECAY,),
    "radam": (_DECAY,),
    "laprop": (_DECAY, {"centered": True}, {"centered": True} | _DECAY),
    "adabelief": (_DECAY,),
    "yogi": (_DECAY,),
    "adopt": (_DECAY,),
    "adan": (_DECAY,),
    "ademamix": (_DECAY,),
    "sophia": ({"weight_decay": 0.0},),
    "schedule_free": ({"base": AdamW(weight_decay=0.0)}, {"base": Sgd()}, {"base": Sgd()} | _DECAY),
}


class Form(NamedTuple):
    """A kind with its options, and what is asked for around it."""

    rule: ElementWise
    state_dtype: Literal["bfloat16"] | None = None
    diagonal: bool = False  # every step brings the diagonal of the Hessian


def forms() -> dict[str, Form]:
    """Those that the goal is for, by name."""
    found = {}
    for kind, cls in KINDS.items():
        for options in ({}, *OPTIONS.get(kind, ())):
            rule = cls(**options)
            if isinstance(rule, ElementWise) and rule.family == "elements":
                found[name_of(rule)] = Form(rule)
    return found


def beside() -> dict[str, Form]:
    """Steps that are more than one compiled loop."""
    return {
        "adam, slots in bfloat16": Form(Adam(), "bfloat16"),
        "adam cautious": Form(Adam(cautious=True)),
        "sophia, given a diagonal": Form(Sophia(), diagonal=True),
    }


def name_of(rule: Optimizer) -> str:
    """Its kind, and what is not as by default."""
    words = [rule.kind]
    for field in fields(rule):
        value = getattr(rule, field.name)
        if value != field.default:
            text = name_of(value) if isinstance(value, Optimizer) else f"{value}"
            words.append(field.name if value is True else f"{field.name} {text}")
    return " ".join(words)


class Kernels:
    """An evaluator that is given the kernels it asks for when it is told to, and not behind a step's back."""

    def __init__(self) -> None:
        self.evaluator = Evaluator(self._ask)
        self._wanted: list[Spec] = []

    def _ask(self, spec: Spec) -> None:
        self._wanted.append(spec)

    def compile(self) -> None:
        for spec in self._wanted:
            self.evaluator.compile(spec)
        self._wanted.clear()

    def check(self) -> None:
        if self._wanted:
            sys.exit("steps were taken in plain NumPy, for want of a kernel")


class Bench:
    """A session of one form, and an array as large as all that its step touches."""

    def __init__(self, form: Form, gradient: Array, kernels: Kernels) -> None:
        seed = None if form.state_dtype is None else 1
        recipe = Recipe(form.rule, Layout({"w": gradient.shape}), state_dtype=form.state_dtype, state_seed=seed)
        session = Session.new(recipe, {"w": gradient}, kernels.evaluator)
        diagonal = {"w": np.abs(gradient)} if "hessian_diagonal" in recipe.needs else None
        checked = session.check(Contribution({"w": gradient}, hessian_diagonal=diagonal))
        session.apply(checked, fresh=False)
        if not form.diagonal:  # the first step must bring it, the next ones need not
            checked = session.check(Contribution({"w": gradient}))
        kernels.compile()
        self._kernels = kernels
        self._step: Callable[[], object] = lambda: session.apply(checked, fresh=False)
        read = [array.nbytes for array in session.state.slots.values()]
        written = [nbytes for nbytes, changes in zip(read, changed_slots(form.rule), strict=True) if changes]
        self.moved = 3 * gradient.nbytes + sum(read) + sum(written)
        self._touched = np.ones((2 * gradient.nbytes + sum(read)) // 8 * 2, np.float32)

    def apply(self, steps: int) -> float:
        seconds = timed(self._step, steps)
        self._kernels.check()
        return seconds

    def copy(self, steps: int) -> float:
        source, target = np.split(self._touched, 2)
        return timed(lambda: np.copyto(target, source), steps) * self.moved / (2 * source.nbytes)

    def over(self, steps: int) -> float:
        array = self._touched
        return timed(lambda: np.negative(array, out=array), steps) * self.moved / (2 * array.nbytes)


def changed_slots(rule: ElementWise) -> list[bool]:
    """Whether an update changes each slot, or gives it back as it was (a curvature that is only looked at)."""
    g, p, *slots = np.ones((2 + len(rule.slots), 1), np.float32)
    scalars = [np.float32(value) for value in rule.tracked(2, dict(rule.scalars))]
    with np.errstate(all="ignore"):
        _, *results = rule.update(g, *([p] if "params" in rule.needs else []), *slots, *scalars)
    return [result is not slot for result, slot in zip(results, slots, strict=True)]


def main() -> None:
    gradient = np.random.default_rng(1).standard_normal(int(sys.argv[1]), np.float32)
    kernels = Kernels()
    if not kernels.evaluator.available:
        sys.exit("Numba is not installed, and so nothing is compiled")
    counted, uncounted = forms(), beside()
    versions = f"numpy {np.__version__}, numba {version('numba')}"
    say({"version": versions, "forms": list(counted), "beside": list(uncounted)})
    bench = None
    for line in sys.stdin:
        word, _, argument = line.strip().partition(" ")
        if word == "take":
            bench = None  # its arrays go before there are others
            bench = Bench((counted | uncounted)[argument], gradient, kernels)
            say({"bytes": bench.moved})
        elif bench is not None:
            turns = {"apply": bench.apply, "copy": bench.copy, "pass": bench.over}
            say({"seconds": turns[word](int(argument))})


if __name__ == "__main__":
    main()
