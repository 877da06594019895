"""The noise of a round: standard normals, the same for the same seed wherever and whenever they are worked out.

A replica that replays the closing of a round draws the same noise again, so it depends on the session's seed, the step
that the round gives and the tensor's name alone. Its streams are none of those of the transform `add_noise`, whose
seed may be the same number: what is added twice must not be one noise of twice the size.
"""

from core.layout import Array
from core.transforms.noise import normal

DOMAIN = "round"


def gaussian(size: int, seed: int, step: int, name: str) -> Array:
    """`size` numbers of the standard normal distribution, float64, (size,), a stream per (seed, step, tensor name)."""
    return normal(size, seed, step, name, DOMAIN)
