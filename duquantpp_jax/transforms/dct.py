"""The discrete cosine transform as a rotation, which does not depend on the data.

    R_ij = sqrt(2 / n) cos(pi (2 i + 1) j / (2 n)),   column 0 divided by sqrt(2)      (DCT-II)

Source: Ahmed, Natarajan, Rao, Discrete Cosine Transform (1974).
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from duquantpp_jax.core import Fitted, Needs, RandomKey, Recipe, Stats, Weights
from duquantpp_jax.transforms.block import BlockRotation, rotation_size


def dct(size: int) -> Float[Array, "size size"]:
    """R: x R are the coefficients of x."""
    i, j = np.arange(size)[:, None], np.arange(size)
    matrix = np.sqrt(2 / size) * np.cos(np.pi * (2 * i + 1) * j / (2 * size))
    matrix[:, 0] /= np.sqrt(2)
    return jnp.asarray(matrix, jnp.float32)


@dataclasses.dataclass(frozen=True)
class FitDct:
    """The same DCT-II for all blocks; `size` is the rotation size, None for the full width."""

    size: int | None = 32
    needs = Needs.NOTHING

    def __call__(self, weights: Weights, stats: Stats, recipe: Recipe, key: RandomKey) -> Fitted:
        return Fitted(BlockRotation(dct(rotation_size(self.size, weights[0].shape[-1]))[None]))
