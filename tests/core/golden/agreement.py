"""Reads golden.npz, runs its cases on Ravine's own core, and measures the distance. Needs none of the libraries.

The archive holds the problem of libraries.py, flat; `float64` (cases, kept steps, parameters), the libraries' runs,
NaN where a tensor takes no part in the case; `float32`, the same runs in float32, as the distance in bits from
float64's, rounded: nearly all of it is small, so that it compresses; schedules, averages, and arrays by SciPy.
`about` says in JSON what each of them is.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from core.layout import Array
from core.schedules import Plateau
from core.session import Session
from tests.core.build import averaging_of, make, optimizer_of, schedule_of, step

GOLDEN = Path(__file__).parent / "golden.npz"

# "float64", "float32": ours against the library in that dtype. "rounding": our float32 against the library's float64.
TOLERANCE = {"float64": 1e-14, "float32": 1e-6, "rounding": 1e-6}
SCHEDULE_TOLERANCE, AVERAGE_TOLERANCE = 1e-15, 1e-14


def to_bits(single: Array, double: Array) -> Array:
    """float32 as the distance of its bits from those of `double` rounded; `from_bits` gives back the very bits."""
    with np.errstate(all="ignore"):
        found: Array = single.view(np.int32) - double.astype(np.float32).view(np.int32)
    return found


def from_bits(distance: Array, double: Array) -> Array:
    with np.errstate(all="ignore"):
        return (double.astype(np.float32).view(np.int32) + distance).view(np.float32)


def apart(found: Array, golden: Array) -> float:
    """The largest difference, relative to the largest golden value; infinite where one of them is not finite."""
    if not np.isfinite(golden).all() or not np.isfinite(found).all():
        return float("inf")
    scale = float(np.abs(golden).max(initial=0.0))
    return float(np.abs(found.astype(np.float64) - golden).max(initial=0.0)) / (scale or 1.0)


@dataclass(frozen=True)
class Golden:
    """The archive, with the cases by name."""

    arrays: Mapping[str, Array]

    @classmethod
    def load(cls) -> "Golden":
        with np.load(GOLDEN) as archive:
            return cls(dict(archive))

    @cached_property
    def about(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(str(self.arrays["about"]))
        return found

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.about["cases"])}

    def library(self, name: str, dtype: str) -> Array:
        """(kept steps, parameters of the case): what the library made of it."""
        place = self._places[name]
        double = self.arrays["float64"][place]
        found = double if dtype == "float64" else from_bits(self.arrays["float32"][place], double)
        return np.ascontiguousarray(found[:, self._columns(self.about["cases"][name])])

    def _columns(self, case: Mapping[str, Any]) -> Array:
        taking_part = [
            np.full(int(np.prod(shape)), case["tensors"] is None or name in case["tensors"])
            for name, shape in self.about["shapes"].items()
        ]
        return np.concatenate(taking_part)

    def _tensors(self, case: Mapping[str, Any], flat: Array) -> dict[str, Array]:
        found, start = {}, 0
        for name, shape in self.about["shapes"].items():
            end = start + int(np.prod(shape))
            if case["tensors"] is None or name in case["tensors"]:
                found[name] = flat[start:end].reshape(shape)
            start = end
        return found

    def ours(self, case: Mapping[str, Any], dtype: str) -> Array:
        """(kept steps, parameters of the case): the same by Ravine's core; `case` as in `about`."""
        session = make(
            optimizer_of(case["optimizer"]),
            self._tensors(case, self.arrays["start"]),
            dtype=dtype,
            transforms=case["transforms"],
        )
        seen = []
        for count, g in enumerate(self.arrays["gradients"], 1):
            beside: dict[str, Any] = {}
            if case["loss"]:
                beside["loss"] = float(self.arrays["losses"][count - 1])
            if case["hessian_diagonal"]:
                beside["hessian_diagonal"] = self._tensors(case, self.arrays["diagonals"][count - 1])
            step(session, self._tensors(case, g), **beside)
            if count in self.about["kept"]:
                seen.append(point(session, case["at"]).copy())
        return np.stack(seen)

    def distances(self, name: str) -> Iterator[tuple[str, float, float]]:
        """(what, distance, tolerance) for each of TOLERANCE."""
        case = self.about["cases"][name]
        allowed = TOLERANCE | case["tolerance"]
        double, single = self.ours(case, "float64"), self.ours(case, "float32")
        yield "float64", apart(double, self.library(name, "float64")), allowed["float64"]
        yield "float32", apart(single, self.library(name, "float32")), allowed["float32"]
        yield "rounding", apart(single, self.library(name, "float64")), allowed["rounding"]

    def schedule_distance(self, name: str) -> float:
        values = self.arrays["schedules"][list(self.about["schedules"]).index(name)]
        schedule = schedule_of(self.about["schedules"][name])
        return apart(np.array([schedule.at(t) for t in range(1, len(values) + 1)]), values)

    def plateau_distance(self, name: str) -> float:
        losses, values = self.arrays[f"plateau/{name}"]
        schedule = schedule_of(self.about["plateaus"][name])
        assert isinstance(schedule, Plateau)
        memory, found = np.array(schedule.start()), []
        for loss in losses:
            found.append(schedule.value(memory))
            schedule.observe(memory, float(loss))
        return apart(np.array(found), values)

    def average_distance(self, name: str) -> float:
        averaging = averaging_of(self.about["averages"][name])
        points = self.arrays["gradients"].astype(np.float64)
        average = np.zeros(points.shape[1])
        for t, point in enumerate(points, 1):
            averaging.include(average, point, t)
        return apart(averaging.result(average, points[-1], len(points)), self.arrays[f"average/{name}"])


def point(session: Session, at: str) -> Array:
    """The parameters, the point for the next gradient, or the final result, flat."""
    if at == "next":
        return session.next_point()
    if at == "final":
        return session.final_point()
    params = session.state.params
    assert params is not None
    return params
