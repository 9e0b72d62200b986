"""Hadamard rotations: agnostic of the data, all entries of one magnitude.

    H_1 = [1],  H_2n = [[H_n, H_n], [H_n, -H_n]],  R = H_n / sqrt(n)

An outlier in one channel is spread evenly over its block. With random signs d, R = diag(d) H_n
/ sqrt(n). Sides that are m times a power of two take Kronecker's product of a matrix of order m
(paley.py) with H_n: 14336 = 28 * 512, 11008 = 344 * 32.

In sequency order (Walsh; GSR) the rows are sorted by how often they change sign. For Sylvester's
matrices that is H P for a permutation P, so where the rotation size is the block size of the
format the channels of each block only change places, and rounding to nearest is the same as
without. It matters where the rotation is larger than the block: then each block of the format
holds a band of frequencies.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from duquantpp_jax.core import Chain, Fitted, Needs, Recipe, Stats, Weights
from duquantpp_jax.transforms.basic import Smooth
from duquantpp_jax.transforms.block import BlockRotation, rotation_size
from duquantpp_jax.transforms.kronecker import KroneckerRotation
from duquantpp_jax.transforms.paley import paley

DENSE_SIDE = 128
"""Largest side that is applied as one matrix; beyond it factors are, none of a side above 64
unless it is Paley's."""


def hadamard(size: int) -> Float[Array, "size size"]:
    """The orthogonal Hadamard matrix of Sylvester's construction, or Paley's times it, float32.

    Raises:
      ValueError: None of this size is known here; names the nearest that are.
    """
    signs = functools.reduce(np.kron, sign_factors(size))
    return jnp.asarray(signs / np.sqrt(size), jnp.float32)


def hadamard_factors(size: int) -> tuple[Float[Array, "_ _"], ...]:
    """Orthogonal matrices whose Kronecker product is `hadamard(size)` up to rounding.

    Raises:
      ValueError: As `hadamard`.
    """
    return tuple(jnp.asarray(f / np.sqrt(len(f)), jnp.float32) for f in sign_factors(size))


def sign_factors(size: int) -> list[Float[np.ndarray, "_ _"]]:
    """Matrices of signs whose Kronecker product is a Hadamard matrix of this size.

    Raises:
      ValueError: As `hadamard`.
    """
    base = _base(size)
    if base is None:
        below = next((n for n in range(size - 1, 0, -1) if _base(n)), None)
        above = next(n for n in range(max(size, 0) + 1, 4 * abs(size) + 4) if _base(n))
        near = f"{above}" if below is None else f"{below} and {above}"
        raise ValueError(f"no Hadamard matrix of side {size} is known here: nearest are {near}")
    stages = (size // base).bit_length() - 1
    count = max(1, -(-stages // 6))
    each = [stages // count + (i < stages % count) for i in range(count)]
    matrix = paley(base) if base > 1 else None
    return ([] if matrix is None else [matrix]) + [_sylvester(n) for n in each if n or base == 1]


def _base(size: int) -> int | None:
    """The least m of which a matrix is known and size / m a power of two; 1 for powers of two."""
    odd = size // (size & -size) if size > 0 else 0
    if odd == 1:
        return 1
    m = 4 * odd
    while m and size % m == 0:
        if paley(m) is not None:
            return m
        m *= 2
    return None


def _sylvester(stages: int) -> Float[np.ndarray, "n n"]:
    signs = np.ones((1, 1))
    for _ in range(stages):
        signs = np.block([[signs, signs], [signs, -signs]])
    return signs


def sequency(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """The rows in order of their changes of sign."""
    signs = np.sign(np.asarray(matrix))
    changes = np.count_nonzero(signs[:, 1:] != signs[:, :-1], axis=1)
    return matrix[np.argsort(changes, kind="stable")]


@dataclasses.dataclass(frozen=True)
class FitHadamard:
    """One Hadamard matrix for all blocks, or one with random signs for each block.

    Attributes:
      size: Rotation size, or None for the full width. Sizes above 128 are applied by factors.
      random_signs: Draw the signs of each block's rows.
      order: Of the rows: as constructed, or by sequency (then always one matrix).

    Source: QuaRot, Ashkboos et al., arXiv 2404.00456; in blocks as in MR-GPTQ and BRQ; sequency
    order: GSR, arXiv 2505.03810.
    """

    size: int | None = 32
    random_signs: bool = False
    order: Literal["natural", "sequency"] = "natural"
    needs = Needs.NOTHING

    @property
    def draws(self) -> bool:
        """Only signs are random."""
        return self.random_signs

    def __call__(
        self, weights: Weights, stats: Stats, recipe: Recipe, key: Key[Array, ""]
    ) -> Fitted:
        width = weights[0].shape[-1]
        size = rotation_size(self.size, width)
        signs = None
        if self.random_signs:
            signs = jax.random.rademacher(key, (width // size, size, 1), jnp.float32)
        if size > DENSE_SIDE and self.order == "natural":
            rotation = KroneckerRotation(hadamard_factors(size))
            flips = () if signs is None else (Smooth(signs.ravel()),)
            return Fitted(Chain((*flips, rotation)))
        matrix = hadamard(size)[None]
        if self.order == "sequency":
            matrix = sequency(matrix[0])[None]
        return Fitted(BlockRotation(matrix if signs is None else signs * matrix))
