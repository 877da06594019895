"""Runs the libraries and writes what they say into golden.npz: `make oracles`. Needs the repository on the path.

    make_golden.py             runs all cases of *_cases.py, compares, and writes golden.npz if all is well
    make_golden.py --anyway    writes golden.npz even so: where the libraries' own numbers are others now
    make_golden.py --compare   runs them and compares (--only GLOB: some of the cases)
    make_golden.py --table     writes how far Ravine's core is from golden.npz into docs/agreement.md

Comparing prints how far Ravine's core and the golden.npz that was there are from the libraries' runs; the status is 1
where something is beyond its tolerance. "theirs" is how far the library's float32 is from its own float64.

The tests read golden.npz alone (agreement.py), so that they need none of the libraries. A module *_cases.py has any of
CASES (name -> Case), SCHEDULES (name -> (our JSON, function giving the values at the first 200 steps)), AVERAGES
(name -> (our JSON, function of points giving their average)), PLATEAUS (name -> (our JSON, losses, function giving the
values that they lead to)) and SCIPY (name -> function giving an array).
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from fnmatch import fnmatchcase
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

# Before any module of cases: it settles what JAX and Keras compute in.
from libraries import KEPT, SCHEDULE_STEPS, SHAPES, Case, Problem, flat, make_problem

from core.optimizers import KINDS
from tests.core.golden.agreement import (
    AVERAGE_TOLERANCE,
    GOLDEN,
    SCHEDULE_TOLERANCE,
    TOLERANCE,
    Golden,
    apart,
    to_bits,
)

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
# Of what SciPy makes of matrices, between two processors.
SCIPY_TOLERANCE = 1e-13
DOCUMENT = ROOT / "docs" / "agreement.md"
BEGIN, END = "<!-- The table is written by `make oracles`. -->\n", "<!-- End of the table. -->\n"
PACKAGES = ("torch", "optax", "jax", "keras", "pytorch_optimizer", "schedulefree", "scipy", "numpy")
NAMES = {"torch": "torch", "optax": "optax", "keras": "Keras", "pytorch_optimizer": "pytorch_optimizer",
         "schedulefree": "schedulefree"}  # fmt: skip


def gathered(table: str) -> dict[str, Any]:
    """The members of the dict called `table` in all modules of cases."""
    found: dict[str, Any] = {}
    for path in sorted(HERE.glob("*_cases.py")):
        members = getattr(import_module(path.stem), table, {})
        twice = found.keys() & members.keys()
        if twice:
            raise ValueError(f"{path.name}: {sorted(twice)} are cases of another module too")
        found |= members
    return found


def run(name: str, case: Case, problem: Problem) -> dict[str, np.ndarray]:
    """float64 (kept steps, all parameters; NaN for those out of the case), float32 the same."""
    columns = flat({key: np.full(shape, case.tensors is None or key in case.tensors) for key, shape in SHAPES.items()})
    rows = [step - 1 for step in KEPT]
    found = {}
    for dtype in ("float64", "float32"):
        seen = case.run(problem.of(dtype, case.tensors))
        if seen.dtype != dtype:
            raise TypeError(f"{name} ran in {seen.dtype}, not in {dtype}")
        if not np.isfinite(seen).all():
            raise ValueError(f"{name} gives numbers that are not finite")
        found[dtype] = np.full((len(KEPT), columns.size), np.nan, dtype)
        found[dtype][:, columns] = seen[rows]
    return found


def described(case: Case) -> dict[str, Any]:
    """The case as JSON: what was asked for, without the library's run."""
    return {name: value for name, value in asdict(case).items() if name != "run"}


def make(pattern: str = "*") -> Golden:
    """Runs the libraries: the cases whose name matches, and everything else."""
    problem = make_problem()
    cases = {name: case for name, case in gathered("CASES").items() if fnmatchcase(name, pattern)}
    found = {}
    for name, case in cases.items():
        try:
            found[name] = run(name, case, problem)
        except Exception as error:
            error.add_note(f"in the case {name}")
            raise
    double = np.stack([values["float64"] for values in found.values()])
    single = np.stack([values["float32"] for values in found.values()])
    gradients = np.stack([flat(g) for g in problem.gradients])
    schedules = {name: (asked, values()) for name, (asked, values) in gathered("SCHEDULES").items()}
    wrong = [name for name, (_, values) in schedules.items() if len(values) != SCHEDULE_STEPS]
    if wrong:
        raise ValueError(f"these schedules do not have {SCHEDULE_STEPS} values: {wrong}")
    averages = {
        name: (asked, average(gradients.astype(np.float64))) for name, (asked, average) in gathered("AVERAGES").items()
    }
    plateaus = {
        name: (asked, np.array([losses, values()])) for name, (asked, losses, values) in gathered("PLATEAUS").items()
    }
    about = {
        "versions": {package: version(package).split("+")[0] for package in PACKAGES},
        "shapes": SHAPES,
        "kept": KEPT,
        "cases": {name: described(case) for name, case in cases.items()},
        "schedules": {name: asked for name, (asked, _) in schedules.items()},
        "averages": {name: asked for name, (asked, _) in averages.items()},
        "plateaus": {name: asked for name, (asked, _) in plateaus.items()},
    }
    return Golden(
        {
            "about": np.array(json.dumps(about)),
            "start": flat(problem.start),
            "gradients": gradients,
            "losses": np.array(problem.losses),
            "diagonals": np.stack([flat(h) for h in problem.diagonals]),
            "float64": double,
            "float32": to_bits(single, double),
            "schedules": np.array([values for _, values in schedules.values()]).reshape(-1, SCHEDULE_STEPS),
        }
        | {f"average/{name}": value for name, (_, value) in averages.items()}
        | {f"plateau/{name}": value for name, (_, value) in plateaus.items()}
        | {f"scipy/{name}": np.asarray(make_array()) for name, make_array in gathered("SCIPY").items()}
    )


class Report:
    """Lines of distances, and whether all of them are within their tolerances."""

    columns = (*TOLERANCE, "theirs", "golden")

    def __init__(self) -> None:
        self.good = True
        print(f"{'':48}" + "".join(f"{what:>10}" for what in self.columns))

    def add(self, name: str, distances: list[tuple[str, float, float]]) -> None:
        """(what, distance, tolerance); "golden": the values that were there, from those made now."""
        beyond = [what for what, distance, tolerance in distances if not distance <= tolerance]
        self.good = self.good and not beyond
        found = {what: f"{distance:10.1e}" for what, distance, _ in distances}
        numbers = "".join(found.get(what, " " * 10) for what in self.columns)
        print(f"{name:48}{numbers}{'   beyond: ' + ', '.join(beyond) if beyond else ''}", flush=True)


def compare(fresh: Golden, committed: Golden) -> bool:
    """Prints a table of the distances. True: all of them are within their tolerances."""
    report = Report()
    for name in fresh.about["cases"]:
        distances = list(fresh.distances(name))
        double, single = fresh.library(name, "float64"), fresh.library(name, "float32")
        distances.append(("theirs", apart(single, double), float("inf")))
        if committed.about["cases"].get(name) == fresh.about["cases"][name]:
            distances.append(("golden", apart(double, committed.library(name, "float64")), distances[0][2]))
        report.add(name, distances)
    for name in fresh.about["schedules"]:
        report.add(f"schedule {name}", [("float64", fresh.schedule_distance(name), SCHEDULE_TOLERANCE)])
    for name in fresh.about["plateaus"]:
        report.add(f"schedule {name}", [("float64", fresh.plateau_distance(name), SCHEDULE_TOLERANCE)])
    for name in fresh.about["averages"]:
        report.add(f"average {name}", [("float64", fresh.average_distance(name), AVERAGE_TOLERANCE)])
    for name, value in fresh.arrays.items():
        before = committed.arrays.get(name)
        if name.startswith("scipy/") and before is not None and before.shape == value.shape:
            report.add(name, [("golden", apart(value, before), SCIPY_TOLERANCE)])
    return report.good


def subjects(case: dict[str, Any]) -> Iterator[str]:
    """What a case says something about: its transforms where it has any, else its kind."""
    if case["transforms"]:
        yield from (f"{transform['kind']} (transform)" for transform in case["transforms"])
        return
    wrapped = case["optimizer"].get("base")
    yield case["optimizer"]["kind"] + (f" ({wrapped['kind']})" if isinstance(wrapped, dict) else "")


def table(golden: Golden) -> str:
    """Markdown: for each kind and library the worst distance in float64, and the number of cases."""
    worst: dict[str, dict[str, list[float]]] = {}
    for name, case in golden.about["cases"].items():
        distance = next(iter(golden.distances(name)))[1]
        for subject in subjects(case):
            worst.setdefault(subject, {}).setdefault(name.split("-")[0], []).append(distance)
    lines = ["| |" + "".join(f" {title} |" for title in NAMES.values()), "|---" * (len(NAMES) + 1) + "|"]
    for subject in sorted(worst, key=lambda subject: ("(transform)" in subject, subject)):
        cells = [worst[subject].get(library, []) for library in NAMES]
        lines.append(f"| `{subject}` |" + "".join(f" {cell_of(cell)}|" for cell in cells))
    return "\n".join(lines) + "\n"


def cell_of(distances: list[float]) -> str:
    if not distances:
        return ""
    worst = max(distances)
    return f"{worst:.0e} ({len(distances)}) " if worst else f"0 ({len(distances)}) "


def reasons(golden: Golden) -> str:
    """Markdown: the cases whose tolerance in float64 is wider, and why."""
    found: dict[str, list[str]] = {}
    for name, case in golden.about["cases"].items():
        if "float64" in case["tolerance"]:
            found.setdefault(case["why"], []).append(f"`{name}`")
    return "".join(f"- {', '.join(names)}: {why}.\n" for why, names in found.items())


def uncovered(golden: Golden) -> str:
    """The kinds that no case is about, as a list in Markdown."""
    methods = [case["optimizer"] for case in golden.about["cases"].values()]
    covered = {method["kind"] for method in methods} | {method.get("base", method)["kind"] for method in methods}
    return ", ".join(f"`{kind}`" for kind in KINDS if kind not in covered)


def write_table() -> None:
    golden = Golden.load()
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    versions = ", ".join(f"{package} {found}" for package, found in golden.about["versions"].items())
    parts = [
        f"{len(golden.about['cases'])} cases, with {versions}.\n",
        table(golden),
        "Beyond rounding in float64:\n",
        reasons(golden),
        f"No library here takes the same steps as {uncovered(golden)}, whose arithmetic has tests of its own.\n",
    ]
    DOCUMENT.write_text(before + BEGIN + "\n" + "\n".join(parts) + "\n" + END + after, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--anyway", action="store_true")
    parser.add_argument("--only", default="*", metavar="GLOB")
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    if asked.only != "*" and not asked.compare:
        parser.error("--only goes with --compare")
    if asked.anyway and (asked.compare or asked.table):
        parser.error("--anyway goes alone")
    if asked.table:
        write_table()
        return
    fresh = make(asked.only)
    good = compare(fresh, Golden.load() if GOLDEN.exists() else fresh)
    if not asked.compare and (good or asked.anyway):
        np.savez_compressed(GOLDEN, **fresh.arrays)
    elif not asked.compare:
        print(f"{GOLDEN.name} stays as it was: something is beyond its tolerance", file=sys.stderr)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
