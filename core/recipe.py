"""What was asked for: the optimizer and everything around it, fixed until somebody changes it by name.

A recipe holds no arrays. `describe` turns it into plain JSON values, every default filled in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Literal

import numpy as np

from core.averaging import Averaging
from core.errors import InvalidRecipe
from core.layout import Layout, Slot
from core.optimizers import Dense, Optimizer


@dataclass(frozen=True)
class Group:
    """Hyperparameters of their own for the tensors whose name matches the glob `match`.

    The last group that matches a tensor decides for it alone. `frozen` tensors keep still, their slots too.
    """

    match: str
    overrides: Mapping[str, Any]
    frozen: bool = False


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a step does. Raises InvalidRecipe for what cannot be."""

    optimizer: Optimizer
    layout: Layout
    dtype: Literal["float32", "float64"] = "float32"
    groups: tuple[Group, ...] = ()
    averaging: Averaging | None = None
    non_finite: Literal["reject", "skip"] = "reject"

    def __post_init__(self) -> None:
        for index, variant in enumerate(self.variants[1:]):
            if variant.dense != self.optimizer.dense:
                raise InvalidRecipe(f"/groups/{index}", "a group cannot change the matrix form of the optimizer")
        if self.optimizer.dense and self.layout.size > Dense.LIMIT:
            raise InvalidRecipe(
                "/optimizer",
                f"{self.optimizer.kind} in matrix form is for at most {Dense.LIMIT} parameters; "
                f"these are {self.layout.size}",
            )
        for index, group in enumerate(self.groups):
            forbidden = sorted(set(group.overrides) - {"lr"})
            if self.optimizer.dense and forbidden:
                raise InvalidRecipe(
                    f"/groups/{index}/{forbidden[0]}", "in matrix form a group may set lr and frozen alone"
                )

    @cached_property
    def variants(self) -> tuple[Optimizer, ...]:
        """The optimizer itself, and then what each group makes of it."""
        made = [self.optimizer]
        for index, group in enumerate(self.groups):
            try:
                made.append(replace(self.optimizer, **group.overrides))
            except InvalidRecipe as error:
                raise InvalidRecipe(f"/groups/{index}{error.pointer}", error.reason) from None
            except TypeError:
                unknown = sorted(set(group.overrides) - {field.name for field in fields(self.optimizer)})
                raise InvalidRecipe(
                    f"/groups/{index}/{unknown[0]}",
                    f"{self.optimizer.kind} has no hyperparameter {unknown[0]!r}",
                ) from None
        return tuple(made)

    @cached_property
    def choices(self) -> dict[str, int | None]:
        """Tensor -> the index of its variant, None for a frozen one."""
        return {slot.name: self._choose(slot.name) for slot in self.layout}

    def _choose(self, name: str) -> int | None:
        chosen: int | None = 0
        for index, group in enumerate(self.groups):
            if fnmatchcase(name, group.match):
                chosen = None if group.frozen else index + 1
        return chosen

    @cached_property
    def slots(self) -> dict[str, float]:
        """Every per-parameter array of the state -> what it is first filled with."""
        found = {slot: variant.initial(slot) for variant in reversed(self.variants) for slot in variant.slots}
        if self.averaging is not None:
            found["average"] = 0.0
        return found

    @cached_property
    def matrices(self) -> dict[str, float]:
        """Every n × n array of the state -> what its diagonal is first filled with."""
        return {matrix: self.optimizer.initial(matrix) for matrix in self.optimizer.matrices}

    @cached_property
    def needs(self) -> frozenset[str]:
        """What a step must bring or the session hold: "params", "hessian", "loss"."""
        needed = frozenset[str]().union(*[variant.needs for variant in self.variants])
        return needed | {"params"} if self.averaging is not None else needed

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return np.dtype(self.dtype)

    def state_bytes(self) -> int:
        """Bytes of all slots and matrices, without the parameters."""
        size = self.layout.size
        return self.numpy_dtype.itemsize * (size * len(self.slots) + size * size * len(self.matrices))

    def live(self, names: Sequence[str] | None = None) -> list[tuple[Slot, int]]:
        """The tensors that move, of those named, in layout order, each with the index of its variant."""
        wanted = None if names is None else set(names)
        found = []
        for slot in self.layout:
            choice = self.choices[slot.name]
            if choice is not None and (wanted is None or slot.name in wanted):
                found.append((slot, choice))
        return found

    def describe(self) -> dict[str, Any]:
        """The recipe as JSON values: optimizer, shapes, dtype, groups, averaging, non_finite."""
        return {
            "optimizer": describe(self.optimizer),
            "shapes": self.layout.shapes,
            "dtype": self.dtype,
            "groups": [
                {"match": group.match}
                | {name: describe(value) for name, value in group.overrides.items()}
                | ({"frozen": True} if group.frozen else {})
                for group in self.groups
            ],
            "averaging": describe(self.averaging),
            "non_finite": self.non_finite,
        }


def describe(value: Any) -> Any:
    """A dataclass with a `kind` as {"kind": …, **fields}; anything else as it is."""
    if is_dataclass(value) and not isinstance(value, type):
        kind = {"kind": value.kind} if hasattr(value, "kind") else {}
        return kind | {field.name: describe(getattr(value, field.name)) for field in fields(value)}
    return value
