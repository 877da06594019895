"""The arrays of what several workers sent and no step has been made of yet: the open round, and the workers' backups.

    :round.total                 Σ w·g so far (n,), where the reducer takes contributions in one by one
    :round.0, :round.1, …        the contributions themselves (n,), where it needs all of them at once
    :round.rows.NAME             row numbers, of a tensor of which every contribution was row-sparse
    :round.hessian, :round.hessian_diagonal, :round.params      what came beside the gradients
    :delay.backup.WORKER         the parameters (n,) that the worker pulled last
    :delay.mean_square           the running mean of g ⊙ g (n,) of the adaptive compensation

The names are those of the checkpoint. Numbers that are no arrays (weights) go there as text.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from core.aggregation.ledger import is_name
from core.errors import InvalidState
from core.layout import Array

ROUND, DELAY = ":round.", ":delay."


@dataclass(slots=True)
class Round:
    """`weights`: tensor, or ":loss" and the like -> the sum of the weights that it was sent with. `rows`: of a tensor
    that came row-sparse only, the rows; None once it came whole. `shares` are the weights of those that are `kept`, and
    `losses` what came with them; of the others `loss` is the weighted sum.
    """

    total: Array | None = None
    kept: list[Array] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    shares: list[float] = field(default_factory=list)
    rows: dict[str, Array | None] = field(default_factory=dict)
    hessian: Array | None = None
    diagonal: Array | None = None
    params: Array | None = None
    loss: float = 0.0
    losses: list[float] = field(default_factory=list)

    @property
    def arrays(self) -> dict[str, Array]:
        """By their names in a checkpoint."""
        found = {str(i): array for i, array in enumerate(self.kept)}
        found |= {f"rows.{name}": array for name, array in self.rows.items() if array is not None}
        single = {
            "total": self.total,
            "hessian": self.hessian,
            "hessian_diagonal": self.diagonal,
            "params": self.params,
        }
        found |= {name: array for name, array in single.items() if array is not None}
        return {ROUND + name: array for name, array in found.items()}

    def copy(self) -> "Round":
        made = Round.read(self.describe(), {name: array.copy() for name, array in self.arrays.items()})
        made.rows = dict(self.rows)
        return made

    def describe(self) -> dict[str, Any]:
        """What is no array, as JSON values; empty for a round that nobody has contributed to."""
        whole = [name for name, rows in self.rows.items() if rows is None]
        found: dict[str, Any] = {"weights": self.weights, "shares": self.shares, "whole": whole}
        found |= {"loss": self.loss, "losses": self.losses}
        return {name: value for name, value in found.items() if value}

    @classmethod
    def read(cls, described: Mapping[str, Any], arrays: Mapping[str, Array]) -> "Round":
        """The inverse of `describe` and `arrays`. Raises InvalidState, or ValueError and the like for bad text."""
        given = {name.removeprefix(ROUND): array for name, array in arrays.items()}
        kept = [given.pop(str(i)) for i in range(sum(name.isdigit() for name in given)) if str(i) in given]
        rows = {name[5:]: given.pop(name) for name in list(given) if name.startswith("rows.")}
        whole: dict[str, Array | None] = dict.fromkeys(described.get("whole", []))
        made = cls(
            total=given.pop("total", None),
            kept=kept,
            weights={str(name): _number(weight) for name, weight in described.get("weights", {}).items()},
            shares=[_number(share) for share in described.get("shares", [])],
            rows={**rows, **whole},
            hessian=given.pop("hessian", None),
            diagonal=given.pop("hessian_diagonal", None),
            params=given.pop("params", None),
            loss=_number(described.get("loss", 0.0)),
            losses=[_number(loss) for loss in described.get("losses", [])],
        )
        if given or len(made.shares) != len(kept) or len(made.losses) > len(kept) or rows.keys() & whole.keys():
            raise InvalidState("the open round has arrays, or weights, that do not belong together")
        return made

    def check(self, size: int, dtype: np.dtype[Any], rows: Mapping[str, int | None]) -> None:
        """Raises InvalidState unless the arrays fit `size` parameters; `rows` is how many each tensor has, None for a
        number.
        """
        flat = [*self.kept, *(a for a in (self.total, self.diagonal, self.params) if a is not None)]
        if any(array.shape != (size,) or array.dtype != dtype for array in flat):
            raise InvalidState(f"an array of the open round is not {dtype} [{size}]")
        if self.hessian is not None and (self.hessian.shape != (size, size) or self.hessian.dtype != np.float64):
            raise InvalidState("the Hessian of the open round is not that of these parameters")
        for name, indices in self.rows.items():
            if name not in rows or (indices is not None and not _are_rows(indices, rows[name])):
                raise InvalidState(f"the open round's rows of {name!r} are not rows of it")
        beside = [array for array in (self.hessian, self.diagonal, self.params) if array is not None]
        if not all(np.isfinite(array).all() for array in [*beside, np.array([self.loss, *self.losses])]):
            raise InvalidState("what came beside the gradients of the open round is not finite")
        if not all(np.isfinite(weight) and weight > 0 for weight in [*self.weights.values(), *self.shares]):
            raise InvalidState("a weight of the open round is none")


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def _are_rows(indices: Array, count: int | None) -> bool:
    if count is None:
        return False
    if indices.ndim != 1 or indices.dtype != np.int64 or not len(indices):
        return indices.ndim == 1 and indices.dtype == np.int64
    return bool(indices[0] >= 0 and indices[-1] < count and np.all(indices[1:] > indices[:-1]))


@dataclass(slots=True)
class Delays:
    """What the delay compensation remembers: a backup for each worker."""

    backups: dict[str, Array] = field(default_factory=dict)
    mean_square: Array | None = None

    @property
    def arrays(self) -> dict[str, Array]:
        """By their names in a checkpoint."""
        found = {f"{DELAY}backup.{worker}": array for worker, array in self.backups.items()}
        return found if self.mean_square is None else found | {f"{DELAY}mean_square": self.mean_square}

    def copy(self) -> "Delays":
        """Backups are never changed, so they are shared."""
        return Delays(dict(self.backups), None if self.mean_square is None else self.mean_square.copy())

    def keep(self, worker: str, point: Array, most: int, seen: Iterable[str]) -> None:
        """`point` (n,), an array that nobody changes, is what `worker` has. Where there are more than `most`, those go
        that come first in `seen`, the names of the workers, the longest unseen first.
        """
        self.backups[worker] = point
        surplus = len(self.backups) - most
        if surplus > 0:
            known = [name for name in seen if name in self.backups]
            for name in [*sorted(self.backups.keys() - set(known)), *known][:surplus]:
                del self.backups[name]

    @classmethod
    def read(cls, arrays: Mapping[str, Array], size: int, dtype: np.dtype[Any], most: int) -> "Delays":
        """`most` workers have a backup. Raises InvalidState."""
        made = cls()
        for name, array in arrays.items():
            if array.shape != (size,) or array.dtype != dtype:
                raise InvalidState(f"{name!r} is not {dtype} [{size}]")
            if name == f"{DELAY}mean_square":
                if not (np.isfinite(array) & (array >= 0)).all():
                    raise InvalidState(f"{name!r} holds a value that it cannot have")
                made.mean_square = array
            elif name.startswith(f"{DELAY}backup.") and is_name(name.removeprefix(f"{DELAY}backup.")):
                made.backups[name.removeprefix(f"{DELAY}backup.")] = array
            else:
                raise InvalidState(f"the state has a tensor {name!r} that the recipe does not know")
        if len(made.backups) > most:
            raise InvalidState(f"{len(made.backups)} workers have a backup, and at most {most} can")
        return made
