"""Whether each kind minimizes, and in how many steps: `make convergence` writes docs/convergence.md.

    python -m benchmarks.convergence                  all methods: some minutes
    python -m benchmarks.convergence adam lamb        these alone; the others stay as they were found before
    python -m benchmarks.convergence --table          only writes the page anew from what was found before

Every method in METHODS runs on every problem of convergence_problems.py, through a core session. Its settings are not
picked by hand: all rates of RATES, and all values of the method's own `choices`, race, and the first to reach the
problem's target wins. Where none does with a constant rate, rates that fall linearly to 0 race, over SPANS of steps.
A kind that NAMED does not have is there with its defaults.

The race goes in rounds. A run leaves it when its loss is no longer a number or enormous, or when it is hopeless: when
the loss would not reach the target in the steps that are left, even if it fell from here PATIENCE times as fast as it
did lately. That is judged once a twentieth of the steps are made, and not where the rate falls.

Where steps bounce, the last digits decide when the target is hit. What won therefore runs again from NEARBY starts,
which differ in those, and the most steps that it took are kept beside its own; where one of these runs does not come
to the target, it has not won.

The settings that won are kept in tests/core/data/convergence.json, which `make test` runs again.
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.convergence_problems import PROBLEMS, Digits, problem_of
from core.optimizers import KINDS
from core.optimizers.parameter_free import UNLIMITED
from tests.core.build import held, make, optimizer_of, step

ROOT = Path(__file__).parents[1]
FOUND = ROOT / "tests" / "core" / "data" / "convergence.json"
PAGE = ROOT / "docs" / "convergence.md"
BEGIN, END = "<!-- The table is written by `make convergence`. -->\n", "<!-- End of the table. -->\n"

RATES = tuple(float(f"{digit}e{power}") for power in range(-6, 2) for digit in (1, 3))
SPANS = (2_000, 20_000)
ROUNDS = (100, 300, 1_000, 3_000, 6_000, 10_000, 20_000)
PATIENCE = 4.0
NEARBY, NUDGE = 4, 1e-15
# The most steps are shown where they are this many times the steps.
SHOWN = 1.1
# Their rate is that of the first step, or of none, or is made up for by a search.
RATELESS = ("rprop", "newton", "lbfgs", "bfgs")
# A loss this many times that of the start is one that will not come back.
ENORMOUS = 1e6
# A run that is longer is not repeated by the tests to its end, but to the first of EARLY by which its lowest loss is
# less than MUCH times that of the start.
LONG, EARLY, MUCH = 3_000, (1_000, 2_000, 3_000, 6_000, 10_000), 0.1


@dataclass(frozen=True)
class Method:
    """A form of a kind. `settings` are those of a request but for the rate, which is the base's where there is one.

    `choices`: values that race beside the rates, by the name of the setting. `on`: what is different on a problem, of
    "settings", "rates", "choices". `costly`: how many steps the tests repeat on a problem where a step takes long.
    """

    name: str
    settings: Mapping[str, Any]
    rates: Sequence[float] = RATES
    choices: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    on: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    costly: Mapping[str, int] = field(default_factory=dict)

    @property
    def spans(self) -> tuple[int | None, ...]:
        """What is tried, in this order: a constant rate, and rates that fall to 0 in so many steps."""
        return (None,) if self.settings["kind"] in RATELESS else (None, *SPANS)

    def candidates(self, problem: str, span: int | None) -> Iterator[dict[str, Any]]:
        """Optimizers as in a request, with each rate and choice; `span`: the steps in which the rate falls to 0."""
        here = self.on.get(problem, {})
        choices = here.get("choices", self.choices)
        for rate, *chosen in itertools.product(here.get("rates", self.rates), *choices.values()):
            optimizer = json.loads(json.dumps({**self.settings, **here.get("settings", {})}))
            if problem != "digits":
                without_decay(optimizer)
            optimizer.get("base", optimizer)["lr"] = rate if span is None else falling(rate, span)
            yield optimizer | dict(zip(choices, chosen, strict=True))


def falling(rate: float, span: int) -> dict[str, Any]:
    return {"kind": "linear", "init": rate, "end": 0.0, "steps": span}


def without_decay(optimizer: dict[str, Any]) -> None:
    """Weight decay moves the minimum: where that is judged to six digits there is to be none."""
    if "weight_decay" in KINDS[optimizer["kind"]].__dataclass_fields__:
        optimizer["weight_decay"] = 0.0
    if "base" in optimizer:
        without_decay(optimizer["base"])


def plain(kind: str, **settings: Any) -> Method:
    return Method(kind, {"kind": kind, **settings})


def form(name: str, kind: str, **settings: Any) -> Method:
    return Method(f"{kind}, {name}", {"kind": kind, **settings})


def around(kind: str, base: str, **more: Any) -> Method:
    return Method(f"{kind} around {base}", {"kind": kind, "base": {"kind": base}}, **more)


ALONE = (1.0,)  # methods that have no rate to choose
WIDE = tuple(float(f"{digit}e{power}") for power in range(-4, 5) for digit in (1, 3))
CURVED = {"negative_curvature": ["gradient", "absolute"]}

NAMED = (
    plain("sgd"),
    plain("momentum"),
    form("nesterov", "momentum", nesterov=True),
    form("lookahead", "momentum", nesterov="lookahead"),
    plain("signsgd"),
    plain("signum"),
    plain("lion"),
    form("cautious", "lion", cautious=True),
    Method("rprop", {"kind": "rprop"}, choices={"min_step": [1e-6, 1e-9]}),
    plain("adagrad"),
    Method("adagrad, full", {"kind": "adagrad", "matrix": "full"}, on={"digits": {"rates": (0.1, 0.3, 1.0)}},
           costly={"digits": 20}),
    Method("adadelta", {"kind": "adadelta"}, WIDE),
    plain("rmsprop"),
    form("centered, momentum", "rmsprop", centered=True, momentum=0.9),
    plain("adam"),
    form("amsgrad raw", "adam", amsgrad="raw"),
    form("amsgrad corrected", "adam", amsgrad="corrected"),
    form("nesterov", "adam", nesterov=True),
    form("cautious", "adam", cautious=True),
    plain("adamw"),
    plain("sparse_adam"),
    plain("adamax"),
    plain("nadam"),
    plain("radam"),
    plain("laprop"),
    plain("adabelief"),
    plain("yogi"),
    plain("adopt"),
    plain("adan"),
    plain("ademamix"),
    Method("sophia", {"kind": "sophia"}, choices={"gamma": [0.01, 1.0]}),
    plain("asgd"),
    form("t0 100", "asgd", t0=100.0),
    around("schedule_free", "sgd", choices={"beta": [0.9, 0.98]}),
    around("schedule_free", "adamw", choices={"beta": [0.9, 0.98]}),
    Method("ftrl", {"kind": "ftrl"}, WIDE),
    plain("fedadagrad"),
    plain("fedadam"),
    plain("fedyogi"),
    Method("lars", {"kind": "lars"}, WIDE),
    plain("lamb"),
    plain("novograd"),
    plain("sm3"),
    plain("adafactor"),
    form("no relative step", "adafactor", relative_step=False, scale_parameter=False),
    plain("muon"),
    plain("shampoo"),
    plain("soap"),
    Method("polyak_sgd", {"kind": "polyak_sgd", "max_lr": 1e3}, (0.5, 1.0, 1.5, 1.9)),
    Method("dog", {"kind": "dog"}, ALONE, {"reps_rel": [1e-6, 1e-4, 1e-2]}),
    Method("dadapt_adam", {"kind": "dadapt_adam"}, ALONE, {"growth_rate": [UNLIMITED, 1.02]}),
    Method("prodigy", {"kind": "prodigy"}, ALONE, {"growth_rate": [UNLIMITED, 1.02]}),
    Method(
        "newton",
        {"kind": "newton"},
        (0.01, 0.1),
        CURVED,
        on={"digits": {"settings": {"negative_curvature": "damp"}, "choices": {"damping": [0.01, 0.1]},
                       "rates": ALONE}},
        costly={"digits": 10},
    ),
    plain("lbfgs"),
    Method("lbfgs, strong_wolfe", {"kind": "lbfgs", "line_search": "strong_wolfe"}, (0.01, 0.1, 1.0)),
    Method("bfgs", {"kind": "bfgs"}, (0.01, 0.1, 1.0)),
    around("lookahead", "adamw"),
    around("sam", "momentum", choices={"rho": [0.05, 1e-3, 1e-4]}),
)  # fmt: skip


def usual(kind: str) -> Method:
    """A kind of which nothing else is said: its defaults, and RATES, which are its base's where it wraps one."""
    base = getattr(KINDS[kind](), "base", None)
    return plain(kind) if base is None else around(kind, base.kind)


METHODS = NAMED + tuple(usual(kind) for kind in KINDS if all(method.settings["kind"] != kind for method in NAMED))

# Why a method falls short of a target, in a line.
NOISE = "on digits each move brings another batch, and the difference of two batches' gradients is taken for curvature."
REASONS: dict[str, str] = {
    "signsgd": "on Rosenbrock its steps are as long across the narrow valley as along it: it bounces from wall to "
    "wall, and a rate small enough for the walls does not come to the end of the valley in 20,000 steps.",
    "rprop": "it is for whole gradients: from batch to batch the signs change by chance, and its steps shrink.",
    "asgd, t0 100": "the average since step 100 has the way to the minimum in it, and forgets it no faster than 1/t.",
    "lbfgs": NOISE,
    "bfgs": NOISE,
}


class Run:
    """A method with its settings on its way down a problem."""

    def __init__(self, problem: str, optimizer: Mapping[str, Any], nudge: int | None = None) -> None:
        """With `nudge`, a seed, the parameters after the first step are changed in their last digits."""
        self.problem = problem_of(problem)
        self.nudge = nudge
        self.optimizer = optimizer
        self.session = make(optimizer_of(optimizer), self.problem.start)
        self.first = self.problem.loss(self.session.final_point())
        self.steps = 0
        self.losses = [self.first]  # at each look
        self.below = 0  # looks in succession
        self.lost = False
        self.most: int | None = None  # steps from starts nearby, once it has won

    @property
    def over(self) -> bool:
        return self.lost or self.reached

    @property
    def reached(self) -> bool:
        return self.below == self.problem.looks

    def advance(self, steps: int) -> None:
        """Goes on until the target is reached, all is lost, or so many steps are made."""
        problem = self.problem
        while self.steps < steps and not self.over:
            step(self.session, fresh=False, **problem.contribution(self.session))
            self.steps += 1
            if self.steps == 1 and self.nudge is not None:
                params = held(self.session)
                params *= 1.0 + NUDGE * np.random.default_rng(self.nudge).normal(size=params.shape)
            if self.steps % problem.every == 0:
                self._look(problem.loss(self.session.final_point()))

    def _look(self, loss: float) -> None:
        self.losses.append(loss)
        self.below = self.below + 1 if loss <= self.problem.target else 0
        # Far beyond the numbers that a gradient could be taken of.
        self.lost = not loss < ENORMOUS * self.first or not np.abs(self.session.next_point()).max() < 1e50

    @property
    def taken(self) -> int:
        """The steps to the first look that was below the target, of those in succession."""
        return self.steps - (self.problem.looks - 1) * self.problem.every

    def lowest(self, steps: int | None = None) -> float:
        """The lowest loss, up to and with a step."""
        looks = self.losses if steps is None else self.losses[: steps // self.problem.every + 1]
        return min(loss for loss in looks if not math.isnan(loss))

    def hopeless(self) -> bool:
        if self.steps < self.problem.limit // 20:
            return False
        before, now = self.lowest(self.steps // 2), self.lowest()
        left = (self.problem.limit - self.steps) / (self.steps - self.steps // 2)
        return math.log(now / self.problem.target) > PATIENCE * left * math.log(before / now) if now > 0.0 else False


def race(problem: str, method: Method, span: int | None) -> tuple[Run | None, Run]:
    """The run that won, if one did, and the one that came closest."""
    runs = [Run(problem, optimizer) for optimizer in method.candidates(problem, span)]
    going, limit = runs, problem_of(problem).limit if span is None else span
    for end in [*(end for end in ROUNDS if end < limit), limit]:
        for run in going:
            run.advance(end)
        for run in sorted((run for run in going if run.reached), key=lambda run: run.taken):
            run.most = run.taken if again(run, method) is not None else most(run)
            if run.most is not None:
                return run, run
        going = [run for run in going if not run.over and (span is not None or not run.hopeless())]
    return None, min(runs, key=lambda run: run.lowest())


def search(problem: str, name: str) -> dict[str, Any]:
    """What is to be kept of a method on a problem."""
    method = next(method for method in METHODS if method.name == name)
    closest: list[Run] = []
    for span in method.spans:
        best, close = race(problem, method, span)
        closest.append(close)
        if best is not None:
            return report(best, method)
    return report(min(closest, key=lambda run: run.lowest()), method)


def report(run: Run, method: Method) -> dict[str, Any]:
    found: dict[str, Any] = {"optimizer": run.optimizer}
    found["steps"] = None if run.most is None else run.taken
    found["most"] = run.most
    found["lowest"] = run.lowest()
    found["again"] = again(run, method)
    if isinstance(run.problem, Digits):
        found["accuracy"] = round(run.problem.accuracy(run.session.final_point()), 4)
    return found


def most(run: Run) -> int | None:
    """The most steps that are taken from starts nearby; None: some of them do not reach the target."""
    found = [run]
    for seed in range(NEARBY):
        found.append(Run(run.problem.name, run.optimizer, seed))
        found[-1].advance(run.problem.limit)
    return max(other.taken for other in found) if all(other.reached for other in found) else None


def again(run: Run, method: Method) -> dict[str, float] | None:
    """The step at which the tests stop, and what the loss has been below by then; None: the tests go to the end."""
    name = run.problem.name
    if run.reached and run.taken <= LONG and name not in method.costly:
        return None
    ends = (method.costly[name],) if name in method.costly else EARLY
    end = next((end for end in ends if run.lowest(end) < MUCH * run.first), ends[-1])
    return {"steps": end, "loss": run.lowest(end)}


# The page


def page(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The table, and why there are holes in it."""
    lines = [
        "| Method | " + " | ".join(name.capitalize() for name in PROBLEMS) + " | Test accuracy |",
        "|---" * (len(PROBLEMS) + 2) + "|",
    ]
    short = []
    for method in METHODS:
        if any(method.name not in found[problem] for problem in PROBLEMS):
            continue  # a new one, not searched yet
        rows = [found[problem][method.name] for problem in PROBLEMS]
        cells = " | ".join(cell(row, method) for row in rows)
        lines.append(f"| {method.name} | {cells} | {rows[-1]['accuracy']:.1%} |")
        if any(row["steps"] is None for row in rows):
            short.append(f"- {method.name}: {REASONS.get(method.name, 'nobody has said yet.')}")
    return "\n".join([*lines, "", *(["Where a target was not reached:", "", *short, ""] if short else ())])


def cell(row: Mapping[str, Any], method: Method) -> str:
    chosen = ", ".join(settings_of(row["optimizer"], method))
    if row["steps"] is None:
        return f"— (to {row['lowest']:.1e}; {chosen})"
    steps = f"{row['steps']:,}"
    if row["most"] > SHOWN * row["steps"]:
        steps += f"–{row['most']:,}"
    return f"**{steps}** ({chosen})"


def settings_of(optimizer: Mapping[str, Any], method: Method) -> Iterable[str]:
    """What was chosen: the rate, and what else there was to choose."""
    rate = optimizer.get("base", optimizer)["lr"]
    if isinstance(rate, dict):
        yield f"{rate['init']:g} → 0 in {rate['steps']:,}"
    else:
        yield f"{rate:g}"
    choices = [method.choices, *(here.get("choices", {}) for here in method.on.values())]
    for name in dict.fromkeys(itertools.chain(*choices)):
        value = optimizer.get(name)
        # The kind's own default needs no mention.
        if value is not None and value != KINDS[optimizer["kind"]].__dataclass_fields__[name].default:
            yield f"{name} {value}"


def write_page(found: Mapping[str, Mapping[str, Any]]) -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + "\n" + page(found) + "\n" + END + rest.partition(END)[2])


# The command


def main() -> None:
    given = arguments()
    found: dict[str, dict[str, Any]] = json.loads(FOUND.read_text()) if FOUND.exists() else {}
    names = [method.name for method in METHODS]
    found = {problem: {name: row for name, row in found.get(problem, {}).items() if name in names}
             for problem in PROBLEMS}  # fmt: skip
    if not given.table:
        wanted = [method.name for method in METHODS if not given.kinds or method.settings["kind"] in given.kinds]
        pairs = [(problem, name) for name in wanted for problem in given.problem or PROBLEMS]
        with ProcessPoolExecutor(given.jobs) as pool:
            for (problem, name), row in zip(pairs, pool.map(search, *zip(*pairs, strict=True)), strict=True):
                found[problem][name] = row
                print(f"{name:<28} {problem:<11} {row['steps'] or '—':>7}  {row['lowest']:.1e}  {row['optimizer']}",
                      file=sys.stderr, flush=True)  # fmt: skip
        ordered = {problem: {name: rows[name] for name in names if name in rows} for problem, rows in found.items()}
        FOUND.write_text(json.dumps(ordered, indent=1) + "\n")
    write_page(found)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.convergence", description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="kinds to search anew; left out: all")
    parser.add_argument("--problem", action="append", choices=PROBLEMS, help="this one alone; may be repeated")
    parser.add_argument("--jobs", type=int, default=1, help="processes at the same time")
    parser.add_argument("--table", action="store_true", help="searches nothing, only writes the page")
    return parser.parse_args()


if __name__ == "__main__":
    main()
