"""Sessions of several workers, in few words: they descend with a rate of 1, from 0 unless told otherwise."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from core.aggregation.aggregation import Aggregation
from core.layout import Array, Rows
from core.optimizers.descent import Sgd
from core.session import Session
from tests.core.build import close, held, make, step

SGD = Sgd(lr=1.0)
ZEROS = {"w": [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], "b": [0.0, 0.0], "s": 0.0}
MAX64, MAX32 = np.finfo(np.float64).max, float(np.finfo(np.float32).max)


def sync(workers: int, **members: Any) -> Aggregation:
    return Aggregation(mode="sync", workers=workers, **members)


def opened(aggregation: Aggregation, params: Mapping[str, Any] = ZEROS, **options: Any) -> Session:
    return make(options.pop("optimizer", SGD), params, aggregation=aggregation, **options)


def flat(session: Session) -> Array:
    """The gradient of the step that was taken, (n,)."""
    return -held(session)


def one(values: Sequence[float]) -> dict[str, Array]:
    return {"w": np.array(values, np.float64)}


def round_of(aggregation: Aggregation, gradients: Sequence[Sequence[float]], **options: Any) -> Array:
    """The gradient that a round of flat `gradients` becomes; `weights` are theirs, `members` go with each."""
    weights, members = options.pop("weights", [1.0] * len(gradients)), options.pop("members", {})
    session = opened(aggregation, {"w": [0.0] * len(gradients[0])}, **options)
    for gradient, weight in zip(gradients, weights, strict=True):
        step(session, one(gradient), weight=weight, **members)
    close(session)
    return flat(session)


def rows(indices: Sequence[int], *values: float) -> Rows:
    return Rows(np.array(indices), np.repeat(np.array(values)[:, None], 2, 1))
