"""Random rotations, uniform over all orthogonal matrices (Haar's measure).

Q is uniform where G = Q U has independent normal entries and U is upper triangular with a positive
diagonal. Without the signs of the diagonal, Q depends on the algorithm of the QR decomposition.

Source: Mezzadri, How to generate random matrices from the classical compact groups,
arXiv math-ph/0609050.
"""

import dataclasses

import jax

from duquantpp_jax.core import Fitted, Needs, RandomKey, Recipe, Stats, Weights
from duquantpp_jax.transforms.block import BlockRotation, polished, rotation_size


@dataclasses.dataclass(frozen=True)
class FitHaar:
    """A random rotation for each block; `size` is the rotation size, None for the full width."""

    size: int | None = 32
    needs = Needs.NOTHING
    draws = True

    def __call__(self, weights: Weights, stats: Stats, recipe: Recipe, key: RandomKey) -> Fitted:
        width = weights[0].shape[-1]
        size = rotation_size(self.size, width)
        # jax.random.orthogonal is this construction, with the signs.
        return Fitted(BlockRotation(polished(jax.random.orthogonal(key, size, (width // size,)))))
