"""Hadamard rotations: agnostic of the data, all entries of one magnitude.

    H_1 = [1],  H_2n = [[H_n, H_n], [H_n, -H_n]],  R = H_n / sqrt(n)

An outlier in one channel is spread evenly over its block. With random signs d, R = diag(d) H_n
/ sqrt(n).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from duquantpp_jax.core import Fitted, Recipe, Stats, Weights
from duquantpp_jax.transforms.block import BlockRotation


def hadamard(size: int) -> Float[Array, "size size"]:
    """The orthogonal Hadamard matrix of Sylvester's construction, float32.

    Raises:
      ValueError: The size is not a power of two.
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"a Hadamard matrix of side {size}: choose a power of two")
    signs = np.ones((1, 1))
    while signs.shape[0] < size:
        signs = np.block([[signs, signs], [signs, -signs]])
    return jnp.asarray(signs / np.sqrt(size), jnp.float32)


@dataclasses.dataclass(frozen=True)
class FitHadamard:
    """One Hadamard matrix for all blocks, or one with random signs for each block.

    Attributes:
      size: Rotation size, a power of two.
      random_signs: Draw the signs of each block's rows.

    Source: QuaRot, Ashkboos et al., arXiv 2404.00456; in blocks as in MR-GPTQ and BRQ.
    """

    size: int = 32
    random_signs: bool = False
    needs = frozenset[str]()

    def __call__(
        self, weights: Weights, stats: Stats, recipe: Recipe, key: Key[Array, ""]
    ) -> Fitted:
        matrix = hadamard(self.size)[None]
        if self.random_signs:
            blocks = weights[0].shape[-1] // self.size
            signs = jax.random.rademacher(key, (blocks, self.size, 1), jnp.float32)
            matrix = signs * matrix
        return Fitted(BlockRotation(matrix))
