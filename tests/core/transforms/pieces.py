"""A transform and its state, run by itself on tensors by name."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from core.layout import Array
from core.transforms import Piece, Transform

SHAPES: dict[str, tuple[int, ...]] = {"w": (4, 3), "b": (3,), "k": (2, 3, 2), "s": ()}


def tensors(seed: int = 7, dtype: str = "float64", shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, Array]:
    """Numbers of magnitudes from 0.01 to 10, exact in float32."""
    random = np.random.default_rng(seed)
    return {
        name: np.asarray(random.normal(size=shape) * 10.0 ** random.uniform(-2, 1, shape), np.float32).astype(dtype)
        for name, shape in shapes.items()
    }


class Running:
    """Does what a session does for a transform: keeps its state, and hands it pieces that cannot be written to."""

    def __init__(
        self, transform: Transform, shapes: Mapping[str, tuple[int, ...]] = SHAPES, dtype: str = "float64"
    ) -> None:
        self.transform = transform
        self.shapes = shapes
        self.t = 0
        self.slots = {
            name: {slot: np.zeros(int(np.prod(shape)), dtype) for slot in transform.slots}
            for name, shape in shapes.items()
        }
        self.own = {
            name: np.full(spec.shape, spec.fill, np.float64 if spec.exact else dtype)
            for name, spec in transform.own().items()
        }

    def take(self, gradients: Mapping[str, Any], params: Mapping[str, Any] | None = None) -> dict[str, Array] | None:
        """What becomes of the gradients; None where the step is held back."""
        pieces = [
            Piece(name, self.shapes[name], frozen(g), None, None if params is None else frozen(params[name]))
            for name, g in gradients.items()
        ]
        return self.take_pieces(pieces)

    def take_pieces(self, pieces: Sequence[Piece]) -> dict[str, Array] | None:
        self.t += 1
        dtypes = [piece.g.dtype for piece in pieces]
        for piece in pieces:
            piece.slots = self.slots[piece.name]
        with np.errstate(all="ignore"):
            moves = self.transform.at(self.t).change(self.t, pieces, self.own)
        assert [piece.g.dtype for piece in pieces] == dtypes
        if not moves:
            return None
        shapes = {
            piece.name: piece.shape if piece.rows is None else (len(piece.rows), *piece.shape[1:]) for piece in pieces
        }
        return {piece.name: piece.g.reshape(shapes[piece.name]) for piece in pieces}


def frozen(array: Any) -> Array:
    """Flat, a copy, not to be written to."""
    flat = np.array(array).reshape(-1)
    flat.flags.writeable = False
    return flat


def changed(transform: Transform, gradients: Mapping[str, Array], params: Mapping[str, Array] | None = None) -> Any:
    """What a transform makes of its first gradients."""
    shapes = {name: g.shape for name, g in gradients.items()}
    dtype = next(iter(gradients.values())).dtype.name
    return Running(transform, shapes, dtype).take(gradients, params)


def numbers(array: Array) -> list[float]:
    """As Python's own floats, flat."""
    return [float(number) for number in array.reshape(-1)]


def close(found: Array, expected: Sequence[float] | Array, relative: float = 1e-14) -> None:
    """Agreement relative to the largest expected number."""
    wanted = np.asarray(expected, np.float64).reshape(found.shape)
    largest = float(np.max(np.abs(wanted), initial=0.0))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=relative * largest)
