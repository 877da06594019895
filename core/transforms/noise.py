"""Noise on the gradient, the same for the same seed wherever and whenever it is worked out."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Ge

from core.hyperparameters import NonNegative
from core.layout import Array
from core.transforms.transform import Piece, Transform


@dataclass(frozen=True)
class AddNoise(Transform):
    """Adds Gaussian noise of variance `eta` / t ** `gamma`, which falls as the gradients t = 1, 2, … come.

    What is added depends on `seed`, t and the tensor's name alone. So it is no secret, and no differential privacy.
    """

    kind: ClassVar[str] = "add_noise"
    formula: ClassVar[str] = r"g \leftarrow g + \mathcal{N}\left(0, \frac{\eta}{t^{\gamma}}\right)"
    source: ClassVar[str] = "Neelakantan et al. 2015, Adding Gradient Noise Improves Learning for Very Deep Networks"
    url: ClassVar[str] = "https://arxiv.org/abs/1511.06807"
    notes: ClassVar[tuple[str, ...]] = (
        "The paper counts from 0 and writes 1 + t, and takes eta of 0.01, 0.3 or 1.",
        "optax.add_noise has the same variances, and other numbers.",
    )

    eta: NonNegative
    gamma: NonNegative = 0.55
    seed: Annotated[int, Ge(0)] = 0

    def change(self, t: int, pieces: Sequence[Piece], own: Mapping[str, Array]) -> bool:
        deviation = float(np.sqrt(self.eta / np.float64(t) ** self.gamma))
        for piece in pieces:
            noise = deviation * normal(piece.g.size, self.seed, t, piece.name)
            piece.g = piece.g + noise.astype(piece.g.dtype)
        return True


def normal(size: int, seed: int, t: int, name: str, domain: str = "") -> Array:
    """`size` numbers of the standard normal distribution, float64, in a stream of its own for each (seed, t, name).

    Whoever else draws names a `domain`, a word: their streams are then others for the same three.
    """
    words = (domain, f"{seed}", f"{t}", name) if domain else (f"{seed}", f"{t}", name)
    key = hashlib.blake2b(":".join(words).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).standard_normal(size)
