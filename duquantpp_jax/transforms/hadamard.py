"""Hadamard rotations, which do not depend on the data; all entries have the same magnitude.

    H_1 = [1],  H_2n = [[H_n, H_n], [H_n, -H_n]],  R = H_n / sqrt(n)

They spread an outlier evenly over its block. With random signs d, R = diag(d) H_n / sqrt(n). For a
side m 2^i, R is the Kronecker product of a matrix of order m (paley.py) with H_(2^i):
14336 = 28 * 512, 11008 = 344 * 32.

Sequency order (Walsh; GSR) sorts the rows by their number of sign changes. For Sylvester's matrices
this gives H P with a permutation P. Where the rotation size is the block size of the format, P only
permutes channels within a block and rounding to nearest does not change. For a larger rotation,
each block of the format gets a band of frequencies.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from duquantpp_jax.core import Chain, Fitted, Needs, RandomKey, Recipe, Stats, Weights
from duquantpp_jax.transforms.basic import Smooth
from duquantpp_jax.transforms.block import BlockRotation, KroneckerRotation, rotation_size
from duquantpp_jax.transforms.paley import paley

DENSE_SIDE = 128
"""Largest side applied as a single matrix. Larger ones are applied by factors of side at most 64,
or by Paley's matrix."""


def hadamard(size: int) -> Float[Array, "size size"]:
    """The orthogonal Hadamard matrix of Sylvester's construction, or Paley's times it.

    Raises:
      ValueError: None of this size is known here; names the nearest known sizes.
    """
    signs = functools.reduce(np.kron, sign_factors(size))
    return jnp.asarray(signs / np.sqrt(size), jnp.float32)


def hadamard_factors(size: int) -> tuple[Float[Array, "_ _"], ...]:
    """Orthogonal matrices whose Kronecker product is `hadamard(size)`; raises as it does."""
    return tuple(jnp.asarray(f / np.sqrt(len(f)), jnp.float32) for f in sign_factors(size))


def sign_factors(size: int) -> list[Float[np.ndarray, "_ _"]]:
    """Matrices of signs whose Kronecker product is a Hadamard matrix; raises as `hadamard` does."""
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
    """The least m with a known matrix of order m and size / m a power of two; 1 for such powers."""
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
    return functools.reduce(np.kron, [np.array([[1.0, 1.0], [1.0, -1.0]])] * stages, np.eye(1))


def sequency(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """The rows sorted by their number of sign changes."""
    signs = np.sign(np.asarray(matrix))
    changes = np.count_nonzero(signs[:, 1:] != signs[:, :-1], axis=1)
    return matrix[np.argsort(changes, kind="stable")]


@dataclasses.dataclass(frozen=True)
class FitHadamard:
    """A Hadamard matrix of side 32 in every block, or of `size`, where None is the full width.

    Attributes:
      size: Rotation size, or None for the full width. Sizes above 128 are applied by factors.
      random_signs: Draw the signs of the rows, for each block by itself.
      sharing: "shared" draws them once for all blocks.
      order: Of the rows: as constructed, or by sequency, which is never applied by factors.

    Source: QuaRot, Ashkboos et al., arXiv 2404.00456; in blocks as in MR-GPTQ and BRQ; sequency
    order: GSR, arXiv 2505.03810.
    """

    size: int | None = 32
    random_signs: bool = False
    order: Literal["natural", "sequency"] = "natural"
    sharing: Literal["per_block", "shared"] = "per_block"
    needs = Needs.NOTHING

    @property
    def draws(self) -> bool:
        return self.random_signs

    def shared(self) -> "FitHadamard":
        return dataclasses.replace(self, sharing="shared")

    def __call__(self, weights: Weights, stats: Stats, recipe: Recipe, key: RandomKey) -> Fitted:
        width = weights[0].shape[-1]
        size = rotation_size(self.size, width)
        signs = None
        if self.random_signs:
            count = 1 if self.sharing == "shared" else width // size
            signs = jax.random.rademacher(key, (count, size, 1), jnp.float32)
        if size > DENSE_SIDE and self.order == "natural":
            rotation = KroneckerRotation(hadamard_factors(size))
            flips = () if signs is None else (Smooth(jnp.resize(signs, (width,))),)
            return Fitted(Chain((*flips, rotation)))
        matrix = hadamard(size)
        matrix = (sequency(matrix) if self.order == "sequency" else matrix)[None]
        return Fitted(BlockRotation(matrix if signs is None else signs * matrix))
